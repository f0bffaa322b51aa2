"""The torch path: chunked over tokens, exact in fp64, and what a CPU runs."""

import torch
from torch import Tensor

# Elements of the wider operand per chunk: a few fp32 work rows that stay in a core's cache.
_CHUNK_ELEMENTS = 1 << 18


def interpolation_points(
    num_source: int, num_target: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each target column reads the source: `floor u_j`, `floor u_j + 1` and `b_j`, `[d_T]` each.

    Equation 6: `u_j = j * (d_M - 1) / (d_T - 1)`. Whole-number arithmetic keeps `b_j` exact to
    one rounding at any width; the last upper index is clamped, where its weight is zero.
    """
    numerator = torch.arange(num_target, device=device) * (num_source - 1)
    lower = numerator // (num_target - 1)
    fraction = (numerator % (num_target - 1)).to(dtype) / (num_target - 1)
    return lower, (lower + 1).clamp_(max=num_source - 1), fraction


def interpolate(hidden: Tensor, width: int) -> Tensor:
    """Stretch or shrink the last dimension linearly, ends on ends (equation 6).

    Args:
        hidden: `[..., d_M]`, floating point.
        width: `d_T`, at least 2.

    Returns:
        `[..., d_T]` in hidden's dtype; hidden itself where `d_T == d_M`.

    Raises:
        ValueError: `width` below 2, where equation 6 divides by zero.
    """
    if width < 2:
        raise ValueError(f"cannot interpolate to width {width}: equation 6 needs d_T of at least 2")
    if width == hidden.shape[-1]:
        return hidden
    lower, upper, fraction = interpolation_points(
        hidden.shape[-1], width, hidden.device, hidden.dtype
    )
    return torch.lerp(hidden[..., lower], hidden[..., upper], fraction)


def _transpose_interpolate(grad: Tensor, num_source: int) -> Tensor:
    """The transpose of `interpolate`: `[c, d_T]` back to `[c, d_M]`."""
    if grad.shape[-1] == num_source:
        return grad
    lower, upper, fraction = interpolation_points(
        num_source, grad.shape[-1], grad.device, grad.dtype
    )
    to_upper = grad * fraction
    result = grad.new_zeros(grad.shape[0], num_source)
    result.index_add_(1, lower, grad - to_upper)
    return result.index_add_(1, upper, to_upper)


def _chunks(student: Tensor, teacher: Tensor) -> list[slice]:
    """Token ranges of at most `_CHUNK_ELEMENTS` elements of the wider operand."""
    tokens = max(1, _CHUNK_ELEMENTS // max(student.shape[1], teacher.shape[1]))
    return [slice(start, start + tokens) for start in range(0, student.shape[0], tokens)]


def _work_dtype(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def cosine_forward(
    student: Tensor, teacher: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The cosine of each token and the two numbers its gradient needs.

    With `p = interp(h)`: `d cos / d p = a * t - b * p`, `a = 1 / (|p| |t|)`, `b = cos / |p|^2`.

    Args:
        student: `h`, `[N, d_M]`.
        teacher: `t`, `[N, d_T]`.
        mask: `[N]` bool, True where the token is ignored.

    Returns:
        The cosine `[N]` and `(a, b)` as `[N, 2]`; both zero for a zero vector and an ignored token.
    """
    dtype = _work_dtype(student)
    cosine = torch.zeros(student.shape[0], dtype=dtype, device=student.device)
    coefficients = torch.zeros(student.shape[0], 2, dtype=dtype, device=student.device)
    for tokens in _chunks(student, teacher):
        interpolated = interpolate(student[tokens].to(dtype), teacher.shape[1])
        target = teacher[tokens].to(dtype)
        dot = torch.linalg.vecdot(interpolated, target)
        square = torch.linalg.vecdot(interpolated, interpolated)
        norms = square.sqrt() * torch.linalg.vecdot(target, target).sqrt()
        live = norms > 0
        if mask is not None:
            live &= ~mask[tokens]
        inverse = torch.where(live, norms, torch.inf).reciprocal()
        cosine[tokens] = dot * inverse
        coefficients[tokens, 0] = inverse
        coefficients[tokens, 1] = dot * inverse / torch.where(live, square, torch.inf)
    return cosine, coefficients


def cosine_backward(
    student: Tensor, teacher: Tensor, coefficients: Tensor, grad_hidden: Tensor | None
) -> Tensor:
    """`grad_hidden + W^T (a * t - b * W h)` in student's dtype, `W` the interpolation.

    Args:
        student: `h`, `[N, d_M]`.
        teacher: `t`, `[N, d_T]`.
        coefficients: `(a, b)` as `[N, 2]`, already times whatever scales the gradient.
        grad_hidden: `[N, d_M]`, the gradient to add to, left as it is; None for zero.
    """
    dtype = _work_dtype(student)
    result = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    for tokens in _chunks(student, teacher):
        interpolated = interpolate(student[tokens].to(dtype), teacher.shape[1])
        a, b = coefficients[tokens].unbind(1)
        direction = a[:, None] * teacher[tokens] - b[:, None] * interpolated
        gradient = _transpose_interpolate(direction, student.shape[1])
        if grad_hidden is not None:
            gradient += grad_hidden[tokens]
        result[tokens] = gradient
    return result
