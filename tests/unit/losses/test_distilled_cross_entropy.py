"""The distilled cross entropy over split vocabularies against a plain one in fp64."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from megatron_let.losses import distilled_cross_entropy as module
from megatron_let.losses.distilled_cross_entropy import SoftTargets, distilled_cross_entropy
from tests.helpers.runs import free_port

SHAPE = (7, 3)
PADDED, KNOWN, WIDTH = 64, 40, 12  # the student's last 24 rows are padding


@dataclass(frozen=True)
class Setting:
    weight: float = 0.4
    temperature: float = 1.0
    top_k: int = 0


SETTINGS = {
    "plain": Setting(),
    "temperature": Setting(0.7, 2.5),
    "top 5": Setting(0.7, 0.5, 5),
    "top 1": Setting(1.0, 1.0, 1),
    "top 500 of 40": Setting(0.4, 1.0, 500),
    "data only": Setting(0.0),
}


@dataclass(frozen=True)
class Inputs:
    logits: Tensor
    labels: Tensor
    hidden: Tensor
    head: Tensor


def inputs(dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*SHAPE, PADDED, generator=generator) * 3
    labels = torch.randint(KNOWN, SHAPE, generator=generator)
    hidden = torch.randn(*SHAPE, WIDTH, generator=generator)
    head = torch.randn(KNOWN, WIDTH, generator=generator)
    return Inputs(logits.to(dtype), labels, hidden, head)


def by_hand(data: Inputs, setting: Setting, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return CE(label), CE(teacher) and the gradient of their mixture times `upstream`."""
    logits = data.logits.double().requires_grad_()
    teacher = (data.hidden.double() @ data.head.double().T) / setting.temperature
    if setting.top_k:
        kept = teacher.topk(min(setting.top_k, KNOWN)).indices
        teacher = torch.full_like(teacher, -torch.inf).scatter(-1, kept, teacher.gather(-1, kept))
    targets = torch.zeros_like(logits).detach()
    targets[..., :KNOWN] = teacher.softmax(-1)
    log_probabilities = logits.log_softmax(-1)
    hard = -log_probabilities.gather(-1, data.labels[..., None]).squeeze(-1)
    soft = -(targets * log_probabilities).sum(-1)
    mixed = (1 - setting.weight) * hard + setting.weight * soft
    (gradient,) = torch.autograd.grad(mixed, logits, upstream.double())
    return hard.detach(), soft.detach(), gradient


def soft_targets(head: Tensor, start: int, setting: Setting, group: object) -> SoftTargets:
    return SoftTargets(
        lambda hidden: hidden @ head.T, start, setting.weight, setting.temperature, setting.top_k,
        group,  # type: ignore[arg-type]
    )  # fmt: skip


UPSTREAM = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))


def run(data: Inputs, setting: Setting, group: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return the package's results on this rank's part of the vocabulary."""
    size, rank = group.size(), group.rank()  # type: ignore[attr-defined]
    start, stop = (PADDED * r // size for r in (rank, rank + 1))
    leaf = data.logits[..., start:stop].contiguous().requires_grad_()
    targets = soft_targets(data.head[start : min(stop, KNOWN)], start, setting, group)
    hard, soft = distilled_cross_entropy(leaf, data.labels, data.hidden, targets)
    assert not soft.requires_grad
    hard.backward(UPSTREAM)
    assert leaf.grad is not None
    return hard.detach(), soft, leaf.grad


class One:
    """A group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize("chunk_elements", [1 << 24, 4 * PADDED, 1])
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_match_fp64_formula(
    name: str, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk_elements)
    data, setting = inputs(), SETTINGS[name]
    for ours, theirs in zip(
        run(data, setting, One()), by_hand(data, setting, UPSTREAM), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_computed_in_fp32(dtype: torch.dtype) -> None:
    data, setting = inputs(dtype), SETTINGS["temperature"]
    hard, soft, gradient = run(data, setting, One())
    expected = by_hand(data, setting, UPSTREAM)
    torch.testing.assert_close(hard.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(soft.double(), expected[1], rtol=1e-5, atol=1e-6)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected[2], rtol=1e-2, atol=1e-6)


def test_extreme_logits_are_finite() -> None:
    data = inputs()
    data.logits.mul_(1e4)
    data.hidden.mul_(1e4)
    assert all(result.isfinite().all() for result in run(data, Setting(), One()))


def test_only_the_logits_are_saved_at_the_size_of_the_vocabulary() -> None:
    data = inputs()
    leaf = data.logits.clone().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        distilled_cross_entropy(
            leaf, data.labels, data.hidden, soft_targets(data.head, 0, Setting(), One())
        )
    large = [t for t in kept if t.numel() >= data.logits.numel()]
    assert [t.data_ptr() for t in large] == [leaf.data_ptr()]


def _rank(rank: int, port: int, folder: Path, size: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    group = torch.distributed.group.WORLD
    results = {name: run(inputs(), setting, group) for name, setting in SETTINGS.items()}
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_vocabulary_split_over_ranks_matches_the_whole(tmp_path: Path) -> None:
    """Four parts of 16 rows; the teacher has 8 rows in the third and none in the last."""
    size = 4
    mp.start_processes(_rank, (free_port(), tmp_path, size), nprocs=size, start_method="spawn")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for name, setting in SETTINGS.items():
        hard, soft, gradient = by_hand(inputs(), setting, UPSTREAM)
        together = torch.cat([part[name][2] for part in parts], dim=-1)
        torch.testing.assert_close(together.double(), gradient, rtol=1e-5, atol=1e-6)
        for part in parts:
            torch.testing.assert_close(part[name][0].double(), hard, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(part[name][1].double(), soft, rtol=1e-5, atol=1e-6)
