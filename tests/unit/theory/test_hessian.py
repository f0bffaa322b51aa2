"""Estimates from products with explicit matrices, whose norm and eigenvalues are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_let.theory.hessian import (
    hessian_product,
    largest_eigenvalue,
    mean_interval,
    random_signs,
)


def symmetric(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return square + square.T


def test_product_equals_the_exact_hessian() -> None:
    matrix, cubic = symmetric(6), torch.arange(6.0, dtype=torch.float64)
    point = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
    unused = torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss = point @ matrix @ point / 2 + (cubic * point**3).sum()
    product = hessian_product(loss, [point, unused])
    exact = torch.zeros(9, 9, dtype=torch.float64)
    exact[:6, :6] = matrix + torch.diag(6 * cubic * point.detach())
    for column in torch.eye(9, dtype=torch.float64):
        torch.testing.assert_close(product(column), exact @ column)


@pytest.mark.parametrize("count", [4, 20])
def test_interval_contains_the_squared_norm_in_95_percent_of_cases(count: int) -> None:
    matrix, hits = symmetric(30), 0
    exact = matrix.square().sum()
    generator = torch.Generator().manual_seed(1)
    for _ in range(500):
        probes = [random_signs(matrix[0], generator) for _ in range(count)]
        estimate = mean_interval([float((matrix @ v).square().sum()) for v in probes])
        hits += estimate.low <= exact <= estimate.high
    assert 0.92 < hits / 500 < 0.98


def test_interval_equals_students_by_hand() -> None:
    # t of 97.5 % with 2 degrees of freedom is 4.30265; the deviation of 1, 2, 3 is 1.
    value, low, high = mean_interval([1.0, 2.0, 3.0])
    half = 4.30265 / 3**0.5
    assert (value, low, high) == pytest.approx((2, 2 - half, 2 + half), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_largest_eigenvalue_is_within_the_interval(dtype: torch.dtype) -> None:
    matrix = symmetric(60)
    exact = float(torch.linalg.eigvalsh(matrix)[-1])
    narrow = matrix.to(dtype)
    estimate = largest_eigenvalue(lambda v: narrow @ v, narrow[0], starts=3, seed=0)
    assert estimate.low <= exact <= estimate.high
    assert estimate.value == pytest.approx(exact, rel=1e-4)
    assert estimate.high - estimate.low < 0.02 * exact


def test_largest_eigenvalue_is_not_the_largest_magnitude() -> None:
    matrix = torch.diag(torch.cat([torch.tensor([-9.0]), torch.linspace(0, 2, 40)])).double()
    assert largest_eigenvalue(lambda v: matrix @ v, matrix[0], 2, 0).value == pytest.approx(2)
