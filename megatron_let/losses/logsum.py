"""The LogSum loss per token, with its gradient recomputed in chunks of tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_let.losses.cosine_reference import chunks, interpolate, work_dtype

ALPHA = 4
# Keeps the logarithm of two equal states finite; differing ones give a sum of about 10 d_T.
EPSILON = 1e-6


def logsum(student: Tensor, teacher: Tensor) -> Tensor:
    """`log(sum_j |z_s,j - z_t,j|^4 + 1e-6)` of each token (Miles and Mikolajczyk, AAAI 2024).

    `z` is the state standardised over its own features, without a learned scale. The published
    form standardises each feature over the batch and takes one logarithm over batch and features;
    one a token depends on no other token, and so on no sharding.

    Args:
        student: `h_M`, `[c, d_M]`.
        teacher: `h_T`, `[c, d_T]`.

    Returns:
        `[c]` in fp32 (fp64 for fp64); it may be negative.
    """
    width, dtype = teacher.shape[-1], work_dtype(student)
    z_student = F.layer_norm(interpolate(student.to(dtype), width), (width,))
    z_teacher = F.layer_norm(teacher.to(dtype), (width,))
    return ((z_student - z_teacher).pow(ALPHA).sum(-1) + EPSILON).log()


class _AlignByLogSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, teacher: Tensor, gradient_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        student, target = hidden.flatten(0, -2), teacher.flatten(0, -2)
        values = torch.cat([logsum(student[c], target[c]) for c in chunks(student, target)])
        ctx.save_for_backward(hidden, teacher, gradient_scale)
        values = values.view(hidden.shape[:-1])
        ctx.mark_non_differentiable(values)
        # detach, not view_as: the pipeline schedule frees a stage's output only if it is no view.
        return hidden.detach(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor, grad_values: Tensor) -> tuple[Tensor, None, None]:
        hidden, teacher, gradient_scale = ctx.saved_tensors
        student, target = hidden.flatten(0, -2), teacher.flatten(0, -2)
        incoming, result = grad_hidden.flatten(0, -2), torch.empty_like(student)
        for c in chunks(student, target):
            with torch.enable_grad():
                leaf = student[c].to(work_dtype(student)).detach().requires_grad_()
                (gradient,) = torch.autograd.grad(logsum(leaf, target[c]).sum(), leaf)
            result[c] = incoming[c] + gradient * gradient_scale
        return result.view(hidden.shape), None, None


def align_by_logsum(
    hidden: Tensor, teacher: Tensor, gradient_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Pass the hidden state on unchanged, and in the backward lower the LogSum loss.

    The backward is `grad_out + gradient_scale * d(sum_tokens logsum) / d hidden`.

    Args:
        hidden: `h_M`, `[..., d_M]`; `[s, b, h]` in Megatron.
        teacher: `h_T`, `[..., d_T]` with the same leading dimensions; it gets no gradient.
        gradient_scale: a 0-dim tensor, whose value is never copied to the host.

    Returns:
        hidden's values in a tensor that is no view; and the loss, `[...]`, with no gradient.
    """
    return _AlignByLogSum.apply(hidden, teacher, gradient_scale)
