"""The public functions and their gradients, over whichever path the device has."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_let.ops import reference


class _InterpolatedCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        cosine, coefficients = reference.cosine_forward(student, teacher, mask)
        ctx.save_for_backward(student, teacher, coefficients)
        return cosine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_cosine: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, coefficients = ctx.saved_tensors
        scaled = coefficients * grad_cosine[:, None]
        return reference.cosine_backward(student, teacher, scaled, None), None, None


class _AlignHiddenState(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, teacher: Tensor, gradient_scale: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        student = hidden.reshape(-1, hidden.shape[-1])
        target = teacher.reshape(-1, teacher.shape[-1])
        cosine, coefficients = reference.cosine_forward(student, target, None)
        ctx.save_for_backward(student, target, coefficients)
        ctx.gradient_scale = gradient_scale
        cosine = cosine.view(hidden.shape[:-1])
        ctx.mark_non_differentiable(cosine)
        # detach, not view_as: the pipeline schedule frees a stage's output only if it is no view.
        return hidden.detach(), cosine

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_hidden: Tensor, grad_cosine: Tensor
    ) -> tuple[Tensor, None, None]:
        student, target, coefficients = ctx.saved_tensors
        scaled = coefficients * -ctx.gradient_scale
        # A new tensor, not an in-place sum: autograd may hand the same gradient to another branch
        # (an addition gives both its inputs one tensor), and the bytes moved are the same.
        gradient = reference.cosine_backward(
            student, target, scaled, grad_hidden.reshape(student.shape)
        )
        return gradient.view(grad_hidden.shape), None, None


def interpolated_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """`cos(interp(h_M), h_T)` of each token, differentiable in the student (equations 4 and 6).

    Args:
        student: `[N, d_M]`, bf16, fp16, fp32 or fp64.
        teacher: `[N, d_T]`, same device; it gets no gradient.
        mask: `[N]` bool, True where the token is ignored: cosine 0 and gradient 0.

    Returns:
        `[N]` in fp32 (fp64 for fp64 inputs). A zero vector has cosine 0 and gradient 0.

    Raises:
        ValueError: shapes that do not match, or `d_T` of 1.
    """
    return _InterpolatedCosine.apply(student, teacher, mask)


def align_hidden_state(
    hidden: Tensor, teacher: Tensor, gradient_scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Pass the hidden state on unchanged, and in the backward pull it towards the teacher's.

    The backward is `grad_out + gradient_scale * d(-sum_tokens cos) / d hidden` (equation 7 with
    the weight and the token mean in `gradient_scale`), so no loss tensor has to travel through
    the pipeline schedule.

    Args:
        hidden: `[..., d_M]`, bf16, fp16, fp32 or fp64; `[s, b, h]` in Megatron.
        teacher: `[..., d_T]` with the same leading dimensions; it gets no gradient.
        gradient_scale: a number, or a 0-dim tensor, which is read on its device.

    Returns:
        hidden's values `[..., d_M]`, and the detached cosine `[...]` in fp32.

    Raises:
        ValueError: shapes that do not match, or `d_T` of 1.
    """
    return _AlignHiddenState.apply(hidden, teacher, gradient_scale)
