"""Equations 4 and 6 written out densely in fp64, and random inputs for the cosine's tests."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import floor

import torch
from torch import Tensor

# Equal, integer ratios, d_M > d_T, d_M < d_T, d_M = 1, and widths of real models.
WIDTHS = [
    (64, 64), (48, 24), (96, 24), (48, 16), (40, 5), (7, 5), (5, 7), (1, 4), (2, 2), (2, 9), (9, 2),
    (36, 100), (321, 130), (1000, 7), (2048, 576), (2048, 768), (1024, 512), (5120, 2048),
]  # fmt: skip
COSINE_ERROR = {
    torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3,
}  # fmt: skip
GRADIENT_ERROR = {
    torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3,
}  # fmt: skip


@cache
def interpolation_matrix(d_m: int, d_t: int) -> Tensor:
    """Return equation 6 as a dense `[d_T, d_M]` matrix, with `u_j` a fraction."""
    matrix = torch.zeros(d_t, d_m, dtype=torch.float64)
    for j in range(d_t):
        u = Fraction(j * (d_m - 1), d_t - 1)
        lower, b = floor(u), float(u - floor(u))
        matrix[j, lower] += 1 - b
        if b:
            matrix[j, lower + 1] += b
    return matrix


def exact_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return equations 4 and 6 in fp64 for any inputs, `[N]`; zero if a vector is zero."""
    matrix = interpolation_matrix(student.shape[1], teacher.shape[1])
    p, t = student.double() @ matrix.T, teacher.double()
    norms = p.norm(dim=1) * t.norm(dim=1)
    return torch.where(norms > 0, (p * t).sum(1) / norms.where(norms > 0, 1), 0)


def exact_gradient(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Return `d sum(weight * cos) / d student` in fp64, by autograd through `exact_cosine`."""
    student = student.detach().double().requires_grad_()
    nonzero = (student.detach().norm(dim=1) > 0) & (teacher.double().norm(dim=1) > 0)
    cosine = exact_cosine(student[nonzero], teacher[nonzero])
    (gradient,) = torch.autograd.grad((cosine * weight.double()[nonzero]).sum(), student)
    return gradient


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Return `|result - expected| / |expected|` in fp64."""
    result, expected = result.double(), expected.double()
    return float((result - expected).norm() / expected.norm().clamp(min=1e-30))


def gradient_error(gradient: Tensor, expected: Tensor, student: Tensor, weight: Tensor) -> float:
    """Return the error relative to the gradient, or to its bound from the rows' norms if larger.

    At a cosine of 1 (always, if d_M is 1) the gradient consists of rounding errors.
    """
    bound = (weight.double() / student.double().norm(dim=1)).norm()
    scale = torch.maximum(expected.norm(), bound)
    return float((gradient.double() - expected).norm() / scale) if scale else 0.0


def random(*shape: int, seed: int = 1) -> Tensor:
    """Return normal fp64 numbers, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_pair(
    num_tokens: int, d_m: int, d_t: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return a student partly aligned with its teacher, so that cosines are not all near 0."""
    teacher = random(num_tokens, d_t, seed=2 * seed)
    student = random(num_tokens, d_m, seed=2 * seed + 1) + teacher @ interpolation_matrix(d_m, d_t)
    return student.to(dtype), teacher.to(dtype)
