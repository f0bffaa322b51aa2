"""RKD and SALT: the hook on the student's loss, and the teacher's work on each rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from megatron.core import parallel_state
from torch import Tensor

from megatron_let.config.let_config import LETConfig
from megatron_let.methods import TrainingRun, build_method
from megatron_let.methods.distillation import LogitsHook, distillation_weight
from megatron_let.placement.sample_sharing import local_shard
from megatron_let.teacher.inspect import inspect_teacher
from megatron_let.teacher.model import Teacher
from tests.helpers.models import VOCAB_SIZE, save_teacher
from tests.helpers.runs import free_port

pytestmark = pytest.mark.medium

NUM_MICROBATCHES, MICRO_BATCH_SIZE, LENGTH = 3, 4, 16


class Model(torch.nn.Module):
    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        return labels + logits

    def forward(self, labels: Tensor, logits: Tensor) -> Tensor:
        return self.compute_language_model_loss(labels, logits)


class Wrapper(torch.nn.Module):
    """Forwards attributes to the model, as DeepSpeed's engine does for the training loop."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.inner = model

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


def test_hook_replaces_loss_of_wrapped_model_until_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, zero = Model(), torch.zeros(2, 2)
    hook = LogitsHook(Wrapper(model))
    monkeypatch.setattr(
        "megatron_let.methods.distillation.distilled_cross_entropy",
        lambda logits, labels, state, targets: (state, state),
    )
    hook.open_step(lambda microbatch: torch.full((2, 2), 7.0), object())  # type: ignore[arg-type]
    assert torch.equal(model(zero, zero), torch.full((2, 2), 7.0))
    hook.close_step()
    hook.remove()
    assert torch.equal(model(zero, zero), zero)


# A global batch on one rank, and on two that split vocabulary or sequence


class LastStage(torch.nn.Module):
    """The part of a GPTModel that the method uses; its logits are fixed."""

    post_process, vocab_size = True, VOCAB_SIZE

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(VOCAB_SIZE))
        shape = (LENGTH, MICRO_BATCH_SIZE, VOCAB_SIZE)
        self.logits = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        return labels.float()


def microbatches() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    shape = (MICRO_BATCH_SIZE, LENGTH)
    for _ in range(NUM_MICROBATCHES):
        tokens = torch.randint(VOCAB_SIZE, shape, generator=generator)
        yield {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(shape)}


def forward_backward(
    *, model: list[LastStage], data_iterator: Iterator[dict[str, Tensor]], **_: Any
) -> list[dict[str, Tensor]]:
    """Run the student's loss on this rank's part of the tokens and the vocabulary."""
    shard = local_shard(sequence_parallel=False)
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    logits = (shard.slice(model[0].logits) + model[0].bias).chunk(size, dim=-1)[rank]
    for microbatch in data_iterator:
        labels = shard.slice(microbatch["labels"].T).T
        model[0].compute_language_model_loss(labels, logits).sum().backward(retain_graph=True)
    return [{} for _ in range(NUM_MICROBATCHES)]


def train(folder: Path) -> dict[str, Any]:
    """Run one step with the teacher and one without; return what this rank did."""
    step, num_samples, destroyed = 0, [], []
    config = LETConfig(
        method="salt", teacher=folder, stop_step=1, teacher_dtype="fp32", kd_weight=0.7
    )
    method = build_method(
        TrainingRun(
            config=config,
            folder=inspect_teacher(folder),
            vocab_size=VOCAB_SIZE,
            seed=1,
            num_steps=2,
            current_step=lambda: step,
            loaded_checkpoint=lambda: None,
            report=lambda line: None,
        )
    )
    hidden_state = Teacher.hidden_state

    def counted(self: Teacher, tokens: Tensor) -> Tensor:
        # The checks of the loader use shorter sequences.
        if tokens.shape[1] == LENGTH:
            num_samples.append(len(tokens))
        return hidden_state(self, tokens)

    model = [LastStage()]
    kwargs = {
        "model": model,
        "num_microbatches": NUM_MICROBATCHES,
        "micro_batch_size": MICRO_BATCH_SIZE,
        "seq_length": LENGTH,
        "forward_only": False,
    }
    with (
        mock.patch.object(Teacher, "hidden_state", counted),
        mock.patch.object(torch.distributed, "destroy_process_group", destroyed.append),
    ):
        reports = method.run(forward_backward, data_iterator=microbatches(), **kwargs)
        gradient = model[0].bias.grad
        num_before = len(destroyed)
        step = 1
        method.run(lambda **_: [], **kwargs)
    return {
        "kd": reports[0]["kd loss"],
        "gradient": gradient,
        "num_samples": num_samples,
        "destroyed": (num_before, len(destroyed)),
    }


def _rank(rank: int, port: int, folder: Path, teacher: Path, num_ranks: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=num_ranks)
    layouts = {"one": (1, 1)} if num_ranks == 1 else {"tp": (2, 1), "cp": (1, 2)}
    for name, (tp, cp) in layouts.items():
        parallel_state.initialize_model_parallel(tp, context_parallel_size=cp)
        torch.save(train(teacher), folder / f"{name}{rank}.pt")
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return the results of each rank, by layout."""
    folder = tmp_path_factory.mktemp("ranks")
    teacher = save_teacher(folder / "teacher")
    for num_ranks in (1, 2):
        arguments = (free_port(), folder, teacher, num_ranks)
        mp.start_processes(_rank, arguments, nprocs=num_ranks, start_method="spawn")
    return {
        name: [torch.load(file) for file in sorted(folder.glob(f"{name}?.pt"))]
        for name in ("one", "tp", "cp")
    }


@pytest.mark.parametrize("layout", ["tp", "cp"])
def test_two_ranks_run_half_of_the_samples_each(results: Any, layout: str) -> None:
    assert results["one"][0]["num_samples"] == NUM_MICROBATCHES * [MICRO_BATCH_SIZE]
    for rank in results[layout]:
        assert rank["num_samples"] == NUM_MICROBATCHES * [MICRO_BATCH_SIZE // 2]


def test_two_tensor_parallel_ranks_match_one(results: Any) -> None:
    (one,), ranks = results["one"], results["tp"]
    for rank in ranks:
        torch.testing.assert_close(rank["kd"], one["kd"], rtol=1e-5, atol=0)
    gradient = sum(rank["gradient"] for rank in ranks)
    torch.testing.assert_close(gradient, one["gradient"], rtol=1e-5, atol=1e-6)


def test_two_context_parallel_ranks_match_one(results: Any) -> None:
    (one,), ranks = results["one"], results["cp"]
    # Megatron sums the pairs over the context-parallel ranks.
    assert sum(rank["kd"][1] for rank in ranks) == one["kd"][1]
    gradient = sum(rank["gradient"] for rank in ranks)
    torch.testing.assert_close(gradient, one["gradient"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["one", "tp", "cp"])
def test_stop_step_keeps_the_groups_of_megatron(results: Any, layout: str) -> None:
    for rank in results[layout]:
        assert rank["destroyed"] == (0, 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"method": "rkd"}, [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        ({"method": "salt"}, [0.5, 0.5, 0.5, 0.5, 0.0, 0.0]),
    ],
)
def test_distillation_weight(values: dict[str, object], expected: list[float]) -> None:
    config = LETConfig(teacher=Path("/t"), stop_step=4, **values)  # type: ignore[arg-type]
    assert [distillation_weight(step, config) for step in range(6)] == pytest.approx(expected)
