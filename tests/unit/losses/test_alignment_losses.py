"""LogSum and CCA against references in fp64 that share no code with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_let.config.let_config import LOSSES
from megatron_let.losses import align_by_cca, align_by_logsum
from megatron_let.losses.cca import RIDGE
from megatron_let.losses.logsum import EPSILON
from megatron_let.losses.registry import alignment_loss
from tests.helpers.plain_reference import interpolate
from tests.helpers.runs import free_port

SCALE = torch.tensor(0.3, dtype=torch.float64)
WIDTHS = [(24, 16), (16, 24), (20, 20)]


def states(
    d_student: int, d_teacher: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """[s, b, d] of tokens whose teacher is partly a linear map of the student, off centre."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(50, 3, d_student, generator=generator, dtype=torch.float64)
    mixing = torch.randn(d_student, d_teacher, generator=generator, dtype=torch.float64)
    noise = torch.randn(50, 3, d_teacher, generator=generator, dtype=torch.float64)
    teacher = student @ mixing + 4 * noise + 2
    teacher[..., 3] *= 100  # as real models have features that dwarf the others
    return (student + 0.5).to(dtype), teacher.to(dtype)


def logsum_by_hand(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over tokens."""

    def standardise(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    difference = standardise(interpolate(student, teacher.shape[-1])) - standardise(teacher)
    return torch.log(difference.abs().pow(4).sum(-1) + EPSILON).sum()


def cca_by_hand(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean canonical correlation, whitened by eigenvectors where the package uses Cholesky."""
    x = interpolate(student, teacher.shape[-1]).flatten(0, -2)
    y = teacher.flatten(0, -2)
    x, y = ((z - z.mean(0)) / z.std(0) for z in (x, y))

    def inverse_root(z: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(z.T @ z / (len(z) - 1) + RIDGE * torch.eye(z.shape[1]))
        return vectors @ torch.diag(values.rsqrt()) @ vectors.T

    whitened = inverse_root(x) @ (x.T @ y / (len(x) - 1)) @ inverse_root(y)
    return torch.linalg.matrix_norm(whitened, "nuc") / min(student.shape[-1], teacher.shape[-1])


def gradient_and_values(
    align: Callable[..., tuple[Tensor, Tensor]], student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    hidden, values = align(leaf, teacher)
    assert torch.equal(hidden, student) and hidden._base is None and not values.requires_grad
    hidden.backward(torch.ones_like(hidden))
    assert leaf.grad is not None
    return leaf.grad, values


def by_logsum(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return align_by_logsum(student, teacher, SCALE)


def by_cca(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return align_by_cca(student, teacher, SCALE, None)


@pytest.mark.parametrize("widths", WIDTHS)
def test_logsum_and_its_gradient(widths: tuple[int, int]) -> None:
    student, teacher = states(*widths)
    gradient, values = gradient_and_values(by_logsum, student, teacher)
    leaf = student.clone().requires_grad_()
    expected = logsum_by_hand(leaf, teacher)
    expected.backward()
    assert values.shape == (50, 3)
    assert values.sum().item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, 1 + SCALE * leaf.grad, rtol=1e-9, atol=1e-12)


def test_logsum_of_equal_states_is_finite_and_has_no_gradient() -> None:
    student, _ = states(16, 16)
    gradient, values = gradient_and_values(by_logsum, student, student)
    torch.testing.assert_close(values, torch.full_like(values, EPSILON).log())
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_logsum_of_zero_vectors_is_finite() -> None:
    student, teacher = states(24, 16)
    student[0], teacher[0] = 0, 0
    gradient, values = gradient_and_values(by_logsum, student, teacher)
    assert gradient.isfinite().all() and values.isfinite().all()


@pytest.mark.parametrize("widths", WIDTHS)
def test_cca_and_its_gradient(widths: tuple[int, int]) -> None:
    student, teacher = states(*widths)
    gradient, values = gradient_and_values(by_cca, student, teacher)
    leaf = student.clone().requires_grad_()
    expected = cca_by_hand(leaf, teacher)
    expected.backward()
    assert values.shape == (50, 3) and (values == values[0, 0]).all()
    assert values[0, 0].item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(gradient, 1 - 150 * SCALE * leaf.grad, rtol=1e-6, atol=1e-9)


def test_cca_of_a_linear_map_is_1_and_of_noise_is_small() -> None:
    student = torch.randn(4000, 1, 8, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.randn(4000, 1, 8, generator=torch.Generator().manual_seed(1)).double()
    mixing = torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).double()
    assert by_cca(student, student @ mixing)[1][0, 0] > 0.95
    assert by_cca(student, noise)[1][0, 0] < 0.05


def test_cca_does_not_depend_on_the_scale_of_a_feature() -> None:
    student, teacher = states(24, 16)
    scaled = teacher * torch.logspace(-3, 3, 16, dtype=torch.float64) + 7
    ours, theirs = (gradient_and_values(by_cca, student, t) for t in (scaled, teacher))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("align", [by_logsum, by_cca])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_narrow_types_are_near_fp64(
    align: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, tolerance: float
) -> None:
    student, teacher = states(24, 16, dtype)
    gradient, values = gradient_and_values(align, student, teacher)
    exact, exact_values = gradient_and_values(align, student.double(), teacher.double())
    assert gradient.dtype == dtype and values.dtype == torch.float32
    assert (gradient.double() - exact).norm() < tolerance * exact.norm()
    torch.testing.assert_close(values.double(), exact_values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_reports_the_cosine_first_and_survives_recompute(name: str) -> None:
    student, teacher = states(24, 16)
    loss = alignment_loss(name, None)
    _, values = loss.align(student, teacher, SCALE)
    by_hand = torch.cosine_similarity(interpolate(student, 16), teacher, dim=-1)
    assert len(values) == len(loss.names) and loss.names[0] == "cosine"
    torch.testing.assert_close(values[0], by_hand)

    def run(x: Tensor) -> Tensor:
        return loss.align(x * 2, teacher, SCALE)[0]

    gradients = []
    for recompute in (False, True):
        leaf = student.clone().requires_grad_()
        out = checkpoint(run, leaf, use_reentrant=False) if recompute else run(leaf)
        out.sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


# Tokens spread over ranks


def _rank(rank: int, port: int, folder: Path, shares: list[int]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=len(shares))
    parts = [pair.split(shares)[rank] for pair in states(24, 16, torch.float32)]
    group = torch.distributed.group.WORLD
    result = gradient_and_values(lambda s, t: align_by_cca(s, t, SCALE, group), *parts)
    torch.save(result, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_cca_over_uneven_shards_is_that_of_the_whole(tmp_path: Path) -> None:
    shares = [11, 39]
    mp.start_processes(
        _rank, (free_port(), tmp_path, shares), nprocs=len(shares), start_method="spawn"
    )
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(shares))]
    whole = gradient_and_values(by_cca, *states(24, 16, torch.float32))
    for index in range(2):
        together = torch.cat([part[index] for part in parts])
        torch.testing.assert_close(together, whole[index], rtol=1e-4, atol=1e-5)
