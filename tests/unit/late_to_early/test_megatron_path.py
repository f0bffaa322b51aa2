"""The module needs no Megatron, and has the gradient of the Megatron path."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_let.checkpoint import reference_models
from megatron_let.checkpoint.parameter_mapping import parameter_mappings, split
from megatron_let.checkpoint.weights import open_weights
from megatron_let.config.let_config import LETConfig
from megatron_let.methods import TrainingRun, build_method
from megatron_let.teacher.inspect import inspect_teacher
from megatron_let.teacher.model import load_teacher
from tests.helpers import plain_reference as plain
from tests.helpers.checkpoints import as_megatron
from tests.helpers.late_to_early import (
    LAYER,
    LENGTH,
    STEP,
    STOP_STEP,
    WEIGHT,
    aligned,
    assert_equal,
)
from tests.helpers.runs import ROOT


def test_module_and_teacher_need_no_megatron() -> None:
    code = (
        "import sys; sys.modules['megatron'] = None\n"
        "import megatron_let.late_to_early, megatron_let.teacher.model, megatron_let.losses.cosine"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def megatron_gradients(
    folder: Path, teacher: Path, ids: Tensor, megatron: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Tensor]]]:
    """Run one global batch of a GPTModel by `LETMethod`, in two microbatches.

    Returns:
        Parameters and gradients under Megatron's names, and the report of each microbatch.
    """
    weights = open_weights(as_megatron(folder, megatron))
    settings = {"weight": WEIGHT, "stop_step": STOP_STEP, "teacher_dtype": "fp32"}
    with reference_models._megatron_on_cpu():
        model = reference_models._build(weights.architecture, 256, torch.float32, {})
        reference_models._load_torch_dist(model, weights.folder)
        method = build_method(
            TrainingRun(
                config=LETConfig(method="let", teacher=teacher, layer=LAYER, **settings),
                folder=inspect_teacher(teacher),
                vocab_size=250,
                seed=1,
                num_steps=STOP_STEP,
                current_step=lambda: STEP,
                loaded_checkpoint=lambda: None,
                report=lambda line: None,
            )
        )
        microbatches = [{"tokens": x, "loss_mask": torch.ones(x.shape)} for x in ids.split(2)]
        reports = method.run(
            forward_backward,
            forward_step_func=lambda data, chunk: language_model_loss(chunk, next(data)["tokens"]),
            data_iterator=iter(microbatches),
            model=[model.eval()],
            num_microbatches=2,
            micro_batch_size=2,
            seq_length=LENGTH,
            forward_only=False,
        )
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
    return parameters, found, reports


def language_model_loss(model: Any, tokens: Tensor) -> Tensor:
    """Return the mean loss of tokens as their own labels, over the unpadded vocabulary."""
    positions = torch.arange(tokens.shape[1])[None]
    logits = model(tokens, positions, None)[..., :250]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def forward_backward(
    *, forward_step_func: Any, data_iterator: Iterator[Any], model: list[Any], **_: Any
) -> list[dict[str, Tensor]]:
    reports = []
    for _ in range(2):
        loss = forward_step_func(data_iterator, model[0]) / 2
        loss.backward()
        reports.append({"lm loss": loss.detach()})
    return reports


@pytest.mark.medium
def test_gradients_equal_the_megatron_path_and_the_plain_model(
    folder: Path, teacher_folder: Path, model: Any, ids: Tensor, tmp_path: Path
) -> None:
    parameters, megatron, reports = megatron_gradients(
        folder, teacher_folder, ids, tmp_path / "megatron"
    )
    teacher = load_teacher(
        inspect_teacher(teacher_folder), LETConfig(teacher_dtype="fp32"), torch.device("cpu")
    )
    let, cosines = aligned(model), []
    for part in ids.split(2):
        with let.step(STEP, teacher.hidden_state(part), num_tokens=ids.numel()):
            logits = model(part).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part.flatten())
            (loss / 2).backward()
        cosines.append(let.report["cosine"].item())
    ours = {name: p.grad for name, p in model.named_parameters()}
    # Megatron's path
    llama = open_weights(folder).architecture
    for mapping in parameter_mappings(llama):
        names = [with_layer(name, mapping.layer) for name in mapping.megatron]
        (theirs,) = (megatron[name] for name in names if name in megatron)
        for name, gradient in zip(mapping.names, split(mapping, theirs, llama), strict=True):
            assert_equal(ours[name], gradient)
            assert gradient.norm() > 0
    sums, count = reports[0]["let cosine"]
    assert sum(cosines) / 2 == pytest.approx((sums / count).item(), abs=1e-6)
    # The plain model, on Megatron's parameters
    state = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).state_dict()
    shape = plain.LlamaShape(3, 4, 2, norm_eps=1e-6)
    of_teacher = plain.Teacher({n: p.double() for n, p in state.items()}, shape, 3, True)
    objective = plain.LETObjective(plain.LlamaShape(4, 4, 2), of_teacher, LAYER, WEIGHT, STOP_STEP)
    cut = {n: p[:250] if len(p) == 256 and "layers" not in n else p for n, p in parameters.items()}
    batch = plain.Batch(ids, ids, torch.ones_like(ids))
    exact = objective.gradients({n: p.double() for n, p in cut.items()}, batch, STEP)
    for name, gradient in exact.gradients.items():
        assert_equal(megatron[name][: len(gradient)].double(), gradient)
    assert sum(cosines) / 2 == pytest.approx(exact.cosine, abs=1e-6)


def with_layer(name: str, layer: int | None) -> str:
    return name if layer is None else name.replace("layers.", f"layers.{layer}.")
