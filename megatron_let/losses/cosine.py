"""Cosine loss (equations 4, 6 and 7): reference in torch, operator, and loss function.

The gradient is one opaque operator (`torch.library.custom_op`, not `triton_op`): torch.compile
calls it as it is. The dispatcher selects a Triton kernel on CUDA and the reference elsewhere.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_let.losses import AlignmentLoss
from megatron_let.losses.interpolation import (
    Interpolation,
    check_shapes,
    chunks,
    rows,
    work_dtype,
)


def load(token_group: ProcessGroup | None) -> AlignmentLoss:
    """Return the cosine loss, which needs no other rank's tokens."""
    return AlignmentLoss(("cosine",), cosine_loss)


def cosine_loss(
    hidden: Tensor, teacher: Tensor, scale: Tensor, grad_hidden: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Add `scale * d(-sum of cos(interp(h_M), h_T) over tokens) / d hidden` to `grad_hidden`.

    The direction stays in fp32 (fp64 for fp64) until it is scaled and added. See `LossFunction`
    for shapes; the reported value is the cosine. A zero vector has cosine 0 and gradient 0.
    """
    check_shapes(hidden, teacher)
    gradient, cosine = _cosine_alignment(rows(hidden), rows(teacher), scale, rows(grad_hidden))
    return gradient.view(hidden.shape), [cosine.view(hidden.shape[:-1])]


def token_cosine(hidden: Tensor, teacher: Tensor) -> Tensor:
    """Return `cos(interp(h_M), h_T)` per token, without a gradient.

    Args:
        hidden: `h_M`, `[..., d_M]`, bf16, fp16, fp32 or fp64.
        teacher: `h_T`, `[..., d_T]` on the same device.

    Returns:
        `[...]` in fp32 (fp64 for fp64).

    Raises:
        ValueError: the shapes do not match, or `d_T` is below 2.
    """
    check_shapes(hidden, teacher)
    student, target = rows(hidden), rows(teacher)
    if student.is_cuda:
        from megatron_let.losses import cosine_triton

        return cosine_triton.cosine(student, target).view(hidden.shape[:-1])
    interpolation, dtype = Interpolation(student, target), work_dtype(student)
    cosine = torch.empty(student.shape[0], dtype=dtype, device=student.device)
    for c in chunks(student, target):
        interpolated = interpolation.apply(student[c].to(dtype))
        cosine[c] = _cosine_and_coefficients(interpolated, target[c].to(dtype))[0]
    return cosine.view(hidden.shape[:-1])


def _cosine_and_coefficients(p: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `cos`, `a = 1 / (|p| |t|)` and `b = cos / |p|^2`: `d cos / d p = a t - b p`.

    Args:
        p: interpolated student, `[c, d_T]`.
        t: teacher, `[c, d_T]`.

    Returns:
        `[c]` each, all zero for a zero vector.
    """
    student_sq = torch.linalg.vecdot(p, p)
    norms = student_sq.sqrt() * torch.linalg.vecdot(t, t).sqrt()
    is_zero = norms == 0  # not the negation of `norms > 0`: a NaN must propagate to the cosine
    a = norms.reciprocal_().masked_fill_(is_zero, 0)
    cosine = torch.linalg.vecdot(p, t).masked_fill_(is_zero, 0) * a
    return cosine, a, cosine / student_sq.masked_fill_(is_zero, 1)


def cosine_reference(
    student: Tensor, teacher: Tensor, scale: Tensor, grad_hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `grad_hidden - scale * d(sum of cos) / d student`, `[N, d_M]`, and cos, `[N]`."""
    interpolation, dtype = Interpolation(student, teacher), work_dtype(student)
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    cosine = torch.empty(student.shape[0], dtype=dtype, device=student.device)
    for c in chunks(student, teacher):
        p, t = interpolation.apply(student[c].to(dtype)), teacher[c].to(dtype)
        cosine[c], a, b = _cosine_and_coefficients(p, t)
        a, b = ((x * -scale)[:, None] for x in (a, b))
        direction = interpolation.transpose(torch.addcmul(a * t, b, p, value=-1))
        gradient[c] = direction.add_(grad_hidden[c])
    return gradient, cosine


@torch.library.custom_op("megatron_let::cosine_alignment", mutates_args=())
def _cosine_alignment(
    student: Tensor, teacher: Tensor, scale: Tensor, grad_hidden: Tensor
) -> tuple[Tensor, Tensor]:
    return cosine_reference(student, teacher, scale, grad_hidden)


@_cosine_alignment.register_kernel("cuda")
def _cosine_alignment_cuda(
    student: Tensor, teacher: Tensor, scale: Tensor, grad_hidden: Tensor
) -> tuple[Tensor, Tensor]:
    from megatron_let.losses import cosine_triton

    return cosine_triton.cosine_alignment(student, teacher, scale, grad_hidden)


@_cosine_alignment.register_fake
def _cosine_alignment_fake(
    student: Tensor, teacher: Tensor, scale: Tensor, grad_hidden: Tensor
) -> tuple[Tensor, Tensor]:
    cosine = student.new_empty(student.shape[0], dtype=work_dtype(student))
    return student.new_empty(student.shape), cosine
