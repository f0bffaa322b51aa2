"""Canonical correlations: known values, scale invariance, tokens over ranks, analytic gradient."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import Tensor

from megatron_let.losses.cca import RIDGE, cca_loss, mean_correlation
from tests.helpers.exact_cosine import random
from tests.helpers.runs import free_port
from tests.unit.losses.test_losses import scalar, states


def gradient_and_correlation(
    hidden: Tensor, teacher: Tensor, group: object = None
) -> tuple[Tensor, Tensor]:
    zeros = torch.zeros_like(hidden)
    gradient, (_, values) = cca_loss(hidden, teacher, scalar(0.3), zeros, group)  # type: ignore[arg-type]
    assert (values == values[0, 0]).all()
    return gradient, values


def correlation_by_autograd(covariances: Tensor, num_directions: int) -> Tensor:
    """Return the nuclear norm of the whitened cross covariance, by differentiable operations."""
    student, cross, teacher = covariances
    inverse_s, inverse_t = (c.diagonal().rsqrt() for c in (student, teacher))
    factor_s, factor_t = (
        torch.linalg.cholesky(c * torch.outer(d, d) + RIDGE * torch.eye(len(c)).double())
        for c, d in ((student, inverse_s), (teacher, inverse_t))
    )
    cross = cross * torch.outer(inverse_s, inverse_t)
    whitened = torch.linalg.inv(factor_s) @ cross @ torch.linalg.inv(factor_t).T
    return torch.linalg.svdvals(whitened).sum() / num_directions


def test_gradients_of_covariances_match_autograd() -> None:
    x = random(400, 16)
    y = x @ random(16, 16, seed=2) + 3 * random(400, 16, seed=3)
    x, y = x - x.mean(0), y - y.mean(0)
    covariances = torch.stack((x.T @ x, x.T @ y, y.T @ y)) / 399
    correlation, of_student, of_cross = mean_correlation(covariances, 16)
    leaf = covariances.requires_grad_()
    expected = correlation_by_autograd(leaf, 16)
    (gradient,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(correlation, expected.detach(), rtol=1e-12, atol=0)
    # The loss uses the symmetric part of the student's.
    symmetric = (gradient[0] + gradient[0].T) / 2
    assert (of_student - symmetric).norm() < 1e-10 * symmetric.norm()
    assert (of_cross - gradient[1]).norm() < 1e-10 * gradient[1].norm()


def test_linear_map_correlates_and_noise_does_not() -> None:
    student, noise = random(4000, 1, 8), random(4000, 1, 8, seed=2)
    mapped = student @ random(8, 8, seed=3)
    assert gradient_and_correlation(student, mapped)[1][0, 0] > 0.95
    assert gradient_and_correlation(student, noise)[1][0, 0] < 0.05


def test_scale_and_offset_of_a_feature_do_not_matter() -> None:
    student, teacher, _ = states(24, 16)
    scaled = teacher * torch.logspace(-3, 3, 16, dtype=torch.float64) + 7
    ours, theirs = (gradient_and_correlation(student, t) for t in (scaled, teacher))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_constant_feature_of_the_student_has_a_finite_gradient() -> None:
    student, teacher, _ = states(16, 16, torch.float32)
    student[..., 5] = 0
    gradient, values = gradient_and_correlation(student, teacher)
    assert gradient.isfinite().all() and values.isfinite().all() and not gradient[..., 5].any()


def _rank(rank: int, port: int, folder: Path, shares: list[int]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=len(shares))
    student, teacher, _ = (x.split(shares)[rank] for x in states(24, 16, torch.float32))
    result = gradient_and_correlation(student, teacher, torch.distributed.group.WORLD)
    torch.save(result, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_uneven_shards_match_the_whole(tmp_path: Path) -> None:
    shares = [11, 39]
    mp.start_processes(
        _rank, (free_port(), tmp_path, shares), nprocs=len(shares), start_method="spawn"
    )
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(shares))]
    student, teacher, _ = states(24, 16, torch.float32)
    whole = gradient_and_correlation(student, teacher)
    for index in range(2):
        together = torch.cat([part[index] for part in parts])
        torch.testing.assert_close(together, whole[index], rtol=1e-4, atol=1e-5)
