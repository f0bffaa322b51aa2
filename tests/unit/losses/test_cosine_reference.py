"""The torch path of the cosine against equations 4 and 6 written out densely in fp64."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import floor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_let.losses import cosine_reference as reference
from megatron_let.losses import interpolate, interpolated_cosine

# Equal, whole ratios, d_M > d_T, d_M < d_T, d_M = 1, and widths of real models.
WIDTHS = [
    (64, 64), (48, 24), (96, 24), (48, 16), (40, 5), (7, 5), (5, 7), (1, 4), (2, 2), (2, 9), (9, 2),
    (36, 100), (321, 130), (1000, 7), (2048, 576), (2048, 768), (1024, 512), (5120, 2048),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COSINE_ERROR = {
    torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3,
}  # fmt: skip
GRADIENT_ERROR = {
    torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3,
}  # fmt: skip


@cache
def interpolation_matrix(d_m: int, d_t: int) -> Tensor:
    """Equation 6 as a dense `[d_T, d_M]` matrix, with `u_j` a fraction."""
    matrix = torch.zeros(d_t, d_m, dtype=torch.float64)
    for j in range(d_t):
        u = Fraction(j * (d_m - 1), d_t - 1)
        lower, b = floor(u), float(u - floor(u))
        matrix[j, lower] += 1 - b
        if b:
            matrix[j, lower + 1] += b
    return matrix


def exact_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Equations 4 and 6 in fp64 for any inputs, `[N]`; zero where a vector is zero."""
    matrix = interpolation_matrix(student.shape[1], teacher.shape[1])
    p, t = student.double() @ matrix.T, teacher.double()
    norms = p.norm(dim=1) * t.norm(dim=1)
    return torch.where(norms > 0, (p * t).sum(1) / norms.where(norms > 0, 1), 0)


def exact_gradient(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """`d sum(weight * cos) / d student` in fp64, by autograd through `exact_cosine`."""
    student = student.double().requires_grad_()
    live = (student.detach().norm(dim=1) > 0) & (teacher.double().norm(dim=1) > 0)
    cosine = exact_cosine(student[live], teacher[live])
    (gradient,) = torch.autograd.grad((cosine * weight.double()[live]).sum(), student)
    return gradient


def relative_error(result: Tensor, expected: Tensor) -> float:
    """`|result - expected| / |expected|` in fp64."""
    result, expected = result.double(), expected.double()
    return float((result - expected).norm() / expected.norm().clamp(min=1e-30))


def gradient_error(gradient: Tensor, expected: Tensor, student: Tensor, weight: Tensor) -> float:
    """Relative error, or error over what the rows' lengths let a gradient be if that is more.

    At a cosine of 1 (always, if d_M is 1) rounding is all that is left of the gradient.
    """
    longest = (weight.double() / student.double().norm(dim=1)).norm()
    scale = torch.maximum(expected.norm(), longest)
    return float((gradient.double() - expected).norm() / scale) if scale else 0.0


def random(*shape: int, seed: int = 1) -> Tensor:
    """Normal fp64 numbers, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_pair(
    num_tokens: int, d_m: int, d_t: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A student that shares some direction with its teacher, so that cosines are not all near 0."""
    teacher = random(num_tokens, d_t, seed=2 * seed)
    student = random(num_tokens, d_m, seed=2 * seed + 1) + teacher @ interpolation_matrix(d_m, d_t)
    return student.to(dtype), teacher.to(dtype)


def test_interpolation_by_hand() -> None:
    # u = 0, 1.5, 3: the ends stay, the middle lies between columns 1 and 2.
    torch.testing.assert_close(
        interpolate(torch.tensor([0.0, 10.0, 30.0, 40.0]), 3), torch.tensor([0.0, 20.0, 40.0])
    )


@pytest.mark.parametrize(("d_m", "d_t"), WIDTHS)
def test_interpolation_is_equation_6(d_m: int, d_t: int) -> None:
    hidden = random(3, 2, d_m)
    expected = hidden @ interpolation_matrix(d_m, d_t).T
    torch.testing.assert_close(interpolate(hidden, d_t), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("d_m", "d_t"), [(2048, 576), (5, 7), (40, 5)])
def test_interpolation_is_torchs_align_corners(d_m: int, d_t: int) -> None:
    hidden = random(3, d_m).float()
    expected = F.interpolate(hidden[:, None], size=d_t, mode="linear", align_corners=True)[:, 0]
    # torch computes u_j in fp32, whose error grows with the column.
    torch.testing.assert_close(interpolate(hidden, d_t), expected, rtol=0, atol=d_m * 1e-6)


def test_interpolation_in_16_bits_rounds_the_result_only() -> None:
    hidden = random(4, 2048).bfloat16()
    expected = (hidden.double() @ interpolation_matrix(2048, 576).T).bfloat16()
    result = interpolate(hidden, 576)
    assert result.dtype == torch.bfloat16
    assert relative_error(result, expected) < 1e-3


def test_equal_widths_interpolate_to_the_same_values() -> None:
    hidden = random(3, 16)
    assert torch.equal(interpolate(hidden, 16), hidden)


def test_interpolation_to_width_one_is_refused() -> None:
    with pytest.raises(ValueError, match="width 1"):
        interpolate(torch.randn(3, 16), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_m", "d_t"), WIDTHS)
def test_cosine_and_gradient(d_m: int, d_t: int, dtype: torch.dtype) -> None:
    student, teacher = random_pair(5, d_m, d_t, dtype, seed=d_m + d_t)
    weight = random(5)
    student.requires_grad_()
    cosine = interpolated_cosine(student, teacher)
    (cosine * weight).sum().backward()
    assert cosine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (cosine.double() - exact_cosine(student, teacher)).abs().max() < COSINE_ERROR[dtype]
    assert student.grad is not None and student.grad.dtype == dtype
    expected = exact_gradient(student.detach(), teacher, weight)
    assert gradient_error(student.grad, expected, student.detach(), weight) < GRADIENT_ERROR[dtype]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(2, 40), st.integers(0, 5), st.integers(0, 2**16))
def test_any_widths_and_token_counts(d_m: int, d_t: int, num_tokens: int, seed: int) -> None:
    student, teacher = random_pair(num_tokens, d_m, d_t, torch.float64, seed)
    weight = random(num_tokens)
    student.requires_grad_()
    cosine = interpolated_cosine(student, teacher)
    (gradient,) = torch.autograd.grad(cosine, student, weight)
    torch.testing.assert_close(cosine, exact_cosine(student, teacher), rtol=0, atol=1e-12)
    expected = exact_gradient(student.detach(), teacher, weight)
    assert gradient_error(gradient, expected, student.detach(), weight) < 1e-12


@pytest.mark.parametrize(("d_m", "d_t"), [(7, 5), (5, 7), (6, 6), (8, 4), (1, 4)])
def test_gradcheck(d_m: int, d_t: int) -> None:
    student, teacher = random_pair(4, d_m, d_t, torch.float64)
    mask = torch.tensor([False, True, False, False])
    student.requires_grad_()
    assert gradcheck(lambda rows: interpolated_cosine(rows, teacher), student)
    assert gradcheck(lambda rows: interpolated_cosine(rows, teacher, mask), student)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_small_and_large_rows(dtype: torch.dtype, scale: float) -> None:
    student, teacher = random_pair(4, 321, 130, torch.float64)
    student, teacher = (student * scale).to(dtype), (teacher * scale).to(dtype)
    student.requires_grad_()
    cosine = interpolated_cosine(student, teacher)
    (gradient,) = torch.autograd.grad(cosine.sum(), student)
    assert (cosine - exact_cosine(student, teacher)).abs().max() < 1e-5
    expected = exact_gradient(student.detach(), teacher, torch.ones(4))
    if dtype == torch.float16 and scale > 1:  # below fp16's smallest normal: see the fused addition
        assert (gradient.double() - expected).abs().max() < 2**-24
    else:
        assert relative_error(gradient, expected) < GRADIENT_ERROR[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_vectors(dtype: torch.dtype) -> None:
    student, teacher = random_pair(3, 12, 7, dtype)
    student[0] = 0
    teacher[1] = 0
    student.requires_grad_()
    cosine = interpolated_cosine(student, teacher)
    cosine.sum().backward()
    assert cosine[:2].tolist() == [0, 0] and cosine[2] != 0
    assert student.grad is not None
    assert not student.grad[:2].any() and student.grad[2].any()


def test_ignored_tokens_even_if_they_hold_nan() -> None:
    student, teacher = random_pair(4, 12, 7, torch.float32)
    student[1] = torch.nan
    teacher[3] = torch.inf
    student.requires_grad_()
    cosine = interpolated_cosine(student, teacher, torch.tensor([False, True, False, True]))
    cosine.sum().backward()
    assert cosine[[1, 3]].tolist() == [0, 0]
    assert student.grad is not None and not student.grad[[1, 3]].any()
    live = torch.tensor([0, 2])
    expected = exact_cosine(student.detach()[live], teacher[live])
    torch.testing.assert_close(cosine[live].double(), expected, rtol=0, atol=1e-5)
    assert student.grad[live].isfinite().all() and student.grad[live].any()


def test_nan_in_a_live_token_shows() -> None:
    student, teacher = random_pair(2, 12, 7, torch.float32)
    student[1, 3] = torch.nan
    cosine = interpolated_cosine(student, teacher)
    assert cosine[0].isfinite() and cosine[1].isnan()


def test_no_tokens() -> None:
    student = torch.randn(0, 12, requires_grad=True)
    cosine = interpolated_cosine(student, torch.randn(0, 7))
    cosine.sum().backward()
    assert cosine.shape == (0,)
    assert student.grad is not None and student.grad.shape == (0, 12)


def test_many_tokens_in_chunks() -> None:
    student, teacher = random_pair(200_000, 6, 4, torch.float32)
    student.requires_grad_()
    cosine = interpolated_cosine(student, teacher)
    (gradient,) = torch.autograd.grad(cosine.sum(), student)
    assert (cosine - exact_cosine(student.detach(), teacher)).abs().max() < 1e-5
    expected = exact_gradient(student.detach(), teacher, torch.ones(200_000))
    assert relative_error(gradient, expected) < 1e-5


@pytest.mark.parametrize("layout", ["rows apart", "columns apart", "same row"])
def test_strided_inputs(layout: str) -> None:
    student, teacher = random_pair(6, 24, 10, torch.float32)
    strided = {
        "rows apart": lambda x: torch.stack([x, torch.full_like(x, 9)], 1)[:, 0],
        "columns apart": lambda x: x.T.contiguous().T,
        "same row": lambda x: x[:1].expand(6, -1),
    }[layout]
    leaf = strided(student).requires_grad_()
    cosine = interpolated_cosine(leaf, strided(teacher))
    (gradient,) = torch.autograd.grad(cosine.sum(), leaf)
    plain = strided(student).contiguous().requires_grad_()
    expected = interpolated_cosine(plain, strided(teacher).contiguous())
    torch.testing.assert_close(cosine, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), plain)[0])


def test_two_runs_give_the_same_bits() -> None:
    student, teacher = random_pair(300, 2048, 576, torch.bfloat16)
    student.requires_grad_()
    runs = []
    for _ in range(2):
        cosine = interpolated_cosine(student, teacher)
        runs.append((cosine, *torch.autograd.grad(cosine.sum(), student)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("student", "teacher", "mask", "message"),
    [
        (torch.zeros(4, 8), torch.zeros(4, 1), None, "width 8 to 1"),
        (torch.zeros(4, 0), torch.zeros(4, 3), None, "width 0 to 3"),
        (torch.zeros(4, 8), torch.zeros(5, 3), None, "different tokens"),
        (torch.zeros(2, 2, 8), torch.zeros(2, 2, 3), None, "flatten"),
        (
            torch.zeros(4, 8),
            torch.zeros(4, 3),
            torch.zeros(3, dtype=torch.bool),
            "one bool a token",
        ),
        (torch.zeros(4, 8), torch.zeros(4, 3), torch.zeros(4), "one bool a token"),
    ],
)
def test_wrong_inputs_are_refused(
    student: Tensor, teacher: Tensor, mask: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        interpolated_cosine(student, teacher, mask)


class _LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes, those of `dtype` apart."""

    def __init__(self, apart: torch.dtype) -> None:
        super().__init__()
        self.apart = apart
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.dtype != self.apart:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


def test_no_copy_of_a_whole_input_in_fp32() -> None:
    student, teacher = random_pair(8192, 512, 144, torch.bfloat16)
    with _LargestTensor(apart=torch.bfloat16) as largest:
        _, coefficients = reference.cosine_forward(student, teacher, None)
        reference.cosine_backward(student, teacher, coefficients, torch.ones_like(student))
    # A copy of the student in fp32 is 16 MiB.
    assert 0 < largest.bytes <= 2**20
