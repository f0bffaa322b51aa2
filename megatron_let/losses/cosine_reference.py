"""The torch path: chunked over tokens, exact in fp64, and what a CPU runs."""

from typing import NamedTuple

import torch
from torch import Tensor

# Elements of the wider operand per chunk: its fp32 work rows stay in a core's cache.
_CHUNK_ELEMENTS = 1 << 18


def work_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class InterpolationPoints(NamedTuple):
    """Where each target column reads: `floor u_j`, `floor u_j + 1` and `b_j`, `[d_T]` each."""

    lower: Tensor
    upper: Tensor
    fraction: Tensor


def interpolation_points(
    num_source: int, num_target: int, device: torch.device, dtype: torch.dtype
) -> InterpolationPoints:
    """Equation 6: `u_j = j * (d_M - 1) / (d_T - 1)`.

    Whole-number arithmetic keeps `b_j` exact to one rounding at any width. The last upper index
    is clamped, where its weight is zero.
    """
    numerator = torch.arange(num_target, device=device) * (num_source - 1)
    lower = numerator // (num_target - 1)
    fraction = (numerator % (num_target - 1)).to(dtype) / (num_target - 1)
    return InterpolationPoints(lower, (lower + 1).clamp(max=num_source - 1), fraction)


def interpolate(hidden: Tensor, width: int) -> Tensor:
    """Stretch or shrink the last dimension linearly, ends on ends (equation 6).

    Args:
        hidden: `[..., d_M]`, floating point.
        width: `d_T`, at least 2.

    Returns:
        `[..., d_T]` in hidden's dtype; hidden as it is where `d_T == d_M`.

    Raises:
        ValueError: `width` below 2, where equation 6 divides by zero.
    """
    if width < 2:
        raise ValueError(f"cannot interpolate to width {width}: equation 6 needs d_T of at least 2")
    dtype = work_dtype(hidden)
    points = interpolation_points(hidden.shape[-1], width, hidden.device, dtype)
    return _interpolate_at(hidden.to(dtype), points).to(hidden.dtype)


def _interpolate_at(hidden: Tensor, points: InterpolationPoints) -> Tensor:
    if hidden.shape[-1] == points.lower.shape[0]:
        return hidden
    lower = hidden.index_select(-1, points.lower)
    return torch.lerp(lower, hidden.index_select(-1, points.upper), points.fraction)


def _transpose_interpolate(grad: Tensor, num_source: int, points: InterpolationPoints) -> Tensor:
    """The transpose of `interpolate`: `[c, d_T]`, which is used up, back to `[c, d_M]`."""
    if grad.shape[-1] == num_source:
        return grad
    to_upper = grad * points.fraction
    result = grad.new_zeros(grad.shape[0], num_source)
    result.index_add_(1, points.lower, grad.sub_(to_upper))
    return result.index_add_(1, points.upper, to_upper)


def chunks(student: Tensor, teacher: Tensor) -> list[slice]:
    """Token ranges of at most `_CHUNK_ELEMENTS` elements of the wider operand."""
    tokens = max(1, _CHUNK_ELEMENTS // max(student.shape[1], teacher.shape[1]))
    return [slice(start, start + tokens) for start in range(0, student.shape[0], tokens)]


def cosine_forward(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The cosine of each token and the two numbers its gradient needs.

    With `p = interp(h)`: `d cos / d p = a * t - b * p`, `a = 1 / (|p| |t|)`, `b = cos / |p|^2`.

    Args:
        student: `h`, `[N, d_M]`.
        teacher: `t`, `[N, d_T]`.
        mask: `[N]` bool, True where the token is ignored.

    Returns:
        The cosine `[N]` and `(a, b)` as `[2, N]`, in fp32 (fp64 for fp64); all zero for a zero
        vector and for an ignored token.
    """
    dtype = work_dtype(student)
    points = interpolation_points(student.shape[1], teacher.shape[1], student.device, dtype)
    cosine = torch.empty(student.shape[0], dtype=dtype, device=student.device)
    coefficients = torch.empty(2, student.shape[0], dtype=dtype, device=student.device)
    for tokens in chunks(student, teacher):
        interpolated = _interpolate_at(student[tokens].to(dtype), points)
        target = teacher[tokens].to(dtype)
        student_sq = torch.linalg.vecdot(interpolated, interpolated)
        norms = student_sq.sqrt() * torch.linalg.vecdot(target, target).sqrt()
        dead = norms == 0  # not `norms > 0` negated: a NaN must show in the cosine
        if mask is not None:
            dead |= mask[tokens]
        inverse = norms.reciprocal_().masked_fill_(dead, 0)
        dot = torch.linalg.vecdot(interpolated, target).masked_fill_(dead, 0)
        cosine[tokens] = dot * inverse
        coefficients[0, tokens] = inverse
        coefficients[1, tokens] = cosine[tokens] / student_sq.masked_fill_(dead, 1)
    return cosine, coefficients


def cosine_backward(
    student: Tensor, teacher: Tensor, coefficients: Tensor, grad_hidden: Tensor | None
) -> Tensor:
    """`grad_hidden + W^T (a * t - b * W h)` in student's dtype, `W` the interpolation.

    Args:
        student: `h`, `[N, d_M]`.
        teacher: `t`, `[N, d_T]`.
        coefficients: `(a, b)` as `[2, N]`, already times whatever scales the gradient.
        grad_hidden: `[N, d_M]`, the gradient to add to, left as it is; None for zero.
    """
    dtype = work_dtype(student)
    points = interpolation_points(student.shape[1], teacher.shape[1], student.device, dtype)
    result = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    for tokens in chunks(student, teacher):
        interpolated = _interpolate_at(student[tokens].to(dtype), points)
        a, b = coefficients[:, tokens, None].unbind()
        direction = torch.addcmul(a * teacher[tokens].to(dtype), b, interpolated, value=-1)
        # An ignored token may hold a NaN, which 0 * NaN would let through.
        direction.masked_fill_(a == 0, 0)
        gradient = _transpose_interpolate(direction, student.shape[1], points)
        if grad_hidden is not None:
            gradient += grad_hidden[tokens]
        result[tokens] = gradient
    return result
