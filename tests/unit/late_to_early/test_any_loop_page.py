"""The examples of docs/any_loop.md train, and their gradient is that of both losses."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from megatron_let.late_to_early import LateToEarly
from tests.helpers import plain_reference as plain
from tests.helpers.late_to_early import BATCH, LAYER, WEIGHT, aligned, assert_equal, gradients
from tests.helpers.runs import ROOT


def example(number: int) -> SimpleNamespace:
    """Run a Python block of the page; return its names."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/any_loop.md").read_text(), re.S)
    names: dict[str, Any] = {}
    exec(blocks[number], names)
    return SimpleNamespace(**names)


def test_loop_of_the_page_trains_past_stop_step(
    model: Any, ids: Tensor, mask: Tensor, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = example(1).small_model(str(teacher_folder), torch.device("cpu"))
    parts = [
        {"input_ids": part, "attention_mask": part_mask, "labels": part}
        for part, part_mask in zip(ids.split(2), mask.split(2), strict=True)
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    module = example(0)
    module.train.__globals__["LateToEarly"] = lambda layer, **_: LateToEarly(layer, 10.0, 6)
    module.train(model, teacher, optimizer, [parts] * 8)
    cosines = [float(line.split()[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(cosines) == 6 and cosines[-1] > cosines[0] + 0.01


class Rows(torch.utils.data.Dataset):
    """Samples of unequal lengths, padded on the right."""

    def __init__(self, ids: Tensor, mask: Tensor) -> None:
        self._ids, self._mask = ids, mask

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, mask = self._ids[index], self._mask[index]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
        }


@pytest.mark.medium
@pytest.mark.parametrize(
    ("accumulation", "num_microbatches"), [(1, 1), (2, 2), (3, 2)], ids=["1", "2", "2-of-3"]
)
def test_callback_of_the_page_gives_the_gradient_of_both_losses(
    accumulation: int,
    num_microbatches: int,
    model: Any,
    ids: Tensor,
    mask: Tensor,
    teacher_folder: Path,
    tmp_path: Path,
) -> None:
    teacher = example(1).small_model(str(teacher_folder), torch.device("cpu"))
    callback_type = example(2).LETCallback
    seen = []

    class Watched(callback_type):  # type: ignore[misc, valid-type]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    let = aligned(model, stop_step=2)
    layer = model.model.layers[LAYER - 1]
    wanted = trainer_gradient(model, ids, mask, teacher, num_microbatches)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), max_steps=3, gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=BATCH // num_microbatches, max_grad_norm=0,
            learning_rate=0.0, logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True, seed=1, data_seed=1,
        ),
        train_dataset=Rows(ids, mask),
        eval_dataset=Rows(ids, mask),
        callbacks=[watched := Watched(let, teacher)],
    )  # fmt: skip
    watched.trainer = trainer
    trainer.train()
    assert_equal(seen[0], wanted)
    cosines = [row["let_cosine"] for row in trainer.state.log_history if "let_cosine" in row]
    assert len(cosines) == 2 and watched.teacher is None
    assert not [hook for hook in layer._forward_hooks.values() if "_on_output" in repr(hook)]
    assert trainer.evaluate()["eval_loss"] > 0


def trainer_gradient(
    model: Any, ids: Tensor, mask: Tensor, teacher: Any, num_microbatches: int
) -> Tensor:
    """Return the gradient at step 0: the loss's mean over labels, the cosine's over tokens.

    A microbatch has the same share of the alignment whatever its length, so the order of the
    samples, which the trainer draws, matters.
    """
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(mask == 0, -100)
    count = (labels[:, 1:] != -100).sum()
    for rows in order.split(BATCH // num_microbatches):
        output = model(
            input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows],
            output_hidden_states=True, num_items_in_batch=count,
        )  # fmt: skip
        valid = mask[rows].bool()
        state = teacher.hidden_state(ids[rows])
        cosine = plain.mean_cosine(output.hidden_states[LAYER][valid], state[valid])
        (output.loss - WEIGHT / num_microbatches * cosine).backward()
    return gradients(model)
