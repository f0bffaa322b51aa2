"""An alignment behind a learned linear map of the student's state."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_let.losses.cosine import Align
from megatron_let.losses.cosine_reference import work_dtype


class _AddInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        # detach, not view_as: the pipeline schedule frees a stage's output only if it is no view.
        return hidden.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (grad_hidden + gradient).to(grad_hidden.dtype), None


def align_by_projection(
    hidden: Tensor, teacher: Tensor, gradient_scale: Tensor, weight: Tensor, align: Align
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Align `p = W h` in place of the interpolated state; W and h both get a gradient.

    The backward of hidden is `grad_out + gradient_scale * W^T g`, with g the gradient of the sum
    of the tokens' losses with respect to p; that of W, `sum_tokens g h^T`, is returned without the
    scale. Both are computed in fp32 (fp64 for fp64), whatever hidden's type.

    Args:
        hidden: `h`, `[..., d_M]`; `[s, b, h]` in Megatron.
        teacher: `[..., d_T]` with the same leading dimensions; it gets no gradient.
        gradient_scale: a 0-dim tensor, whose value is never copied to the host.
        weight: W, `[d_T, d_M]`.
        align: the alignment; with p as wide as the teacher it interpolates nothing.

    Returns:
        hidden's values in a tensor that is no view; what `align` reports, with p as the student;
        and the gradient of W, `[d_T, d_M]`.
    """
    dtype = work_dtype(hidden)
    rows, matrix = hidden.detach().flatten(0, -2).to(dtype), weight.to(dtype)
    projected = (rows @ matrix.T).view(*hidden.shape[:-1], -1).requires_grad_()
    with torch.enable_grad():
        aligned, values = align(projected, teacher, projected.new_ones(()))
    (direction,) = torch.autograd.grad(aligned, projected, torch.zeros_like(projected))
    direction = direction.flatten(0, -2)
    of_hidden = (direction @ matrix).mul_(gradient_scale).view(hidden.shape)
    return _AddInBackward.apply(hidden, of_hidden), values, direction.T @ rows
