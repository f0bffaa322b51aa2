"""Linear interpolation to the teacher's width (equation 6), its transpose, and token chunks."""

import torch
from torch import Tensor

# Elements of the wider operand per chunk: its fp32 working rows stay in a core's cache.
_CHUNK_ELEMENTS = 1 << 18


def work_dtype(tensor: Tensor) -> torch.dtype:
    """Return fp64 for fp64 and fp32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def rows(tensor: Tensor) -> Tensor:
    """Return `[..., d]` as `[N, d]`; copies only if the leading dimensions cannot be merged."""
    return tensor.reshape(-1, tensor.shape[-1])


def chunks(student: Tensor, teacher: Tensor) -> list[slice]:
    """Return token ranges of at most `_CHUNK_ELEMENTS` elements of the wider operand."""
    tokens = max(1, _CHUNK_ELEMENTS // max(student.shape[1], teacher.shape[1]))
    return [slice(start, start + tokens) for start in range(0, student.shape[0], tokens)]


def check_shapes(hidden: Tensor, teacher: Tensor) -> None:
    """Check that hidden can be interpolated and compared with the teacher's state.

    Raises:
        ValueError: the leading dimensions differ, or a width is too small.
    """
    if hidden.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student {tuple(hidden.shape)} and teacher {tuple(teacher.shape)} hold different "
            "tokens: give both the same leading dimensions"
        )
    if hidden.shape[-1] < 1 or teacher.shape[-1] < 2:
        raise ValueError(
            f"cannot interpolate width {hidden.shape[-1]} to {teacher.shape[-1]}: equation 6 "
            "needs d_M of at least 1 and d_T of at least 2"
        )


class Interpolation:
    """The linear map W of equation 6 from student width `d_M` to teacher width `d_T`.

    Target column j reads source position `u_j = j * (d_M - 1) / (d_T - 1)`. Integer arithmetic
    keeps the weights exact to one rounding at any width.
    """

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        """Compute the source columns and weights of each target column.

        Args:
            student: `[..., d_M]`; its device and working dtype are the map's.
            teacher: `[..., d_T]`.
        """
        self._num_source, num_target = student.shape[-1], teacher.shape[-1]
        self._is_identity = self._num_source == num_target
        numerator = torch.arange(num_target, device=student.device) * (self._num_source - 1)
        self._lower = numerator // (num_target - 1)
        # The last upper index is clamped; its weight is zero.
        self._upper = (self._lower + 1).clamp(max=self._num_source - 1)
        remainder = numerator % (num_target - 1)
        self._fraction = remainder.to(work_dtype(student)) / (num_target - 1)

    def apply(self, hidden: Tensor) -> Tensor:
        """Return `W h`, `[..., d_T]`, for `[..., d_M]`; hidden itself if the widths are equal."""
        if self._is_identity:
            return hidden
        lower = hidden.index_select(-1, self._lower)
        return torch.lerp(lower, hidden.index_select(-1, self._upper), self._fraction)

    def transpose(self, grad: Tensor) -> Tensor:
        """Return `W^T g`, `[c, d_M]`, for `[c, d_T]`, which is overwritten."""
        if self._is_identity:
            return grad
        to_upper = grad * self._fraction
        result = grad.new_zeros(grad.shape[0], self._num_source)
        result.index_add_(1, self._lower, grad.sub_(to_upper))
        return result.index_add_(1, self._upper, to_upper)
