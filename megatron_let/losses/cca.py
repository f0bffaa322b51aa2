"""Canonical correlations of states whose tokens may be spread over ranks."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_let.losses.cosine_reference import interpolate, work_dtype

# Of the correlation matrices, whose diagonal is 1.
RIDGE = 1e-3
# Below this many tokens a feature, chance alone correlates them.
TOKENS_PER_FEATURE = 4


def mean_canonical_correlation(
    student: Tensor, cross: Tensor, teacher: Tensor, num_directions: int
) -> Tensor:
    """Mean canonical correlation from covariances: the nuclear norm of the whitened cross one.

    Each feature is first divided by its standard deviation, which canonical correlations do not
    depend on, so that one ridge suits all of them.

    Args:
        student, cross, teacher: `[d, d]` covariances of student and student, student and teacher,
            teacher and teacher.
        num_directions: that there can be: the smaller width.
    """
    deviation_s, deviation_t = (
        c.diagonal().clamp_min(torch.finfo(c.dtype).tiny).rsqrt() for c in (student, teacher)
    )
    ridge = RIDGE * torch.eye(len(student), dtype=student.dtype, device=student.device)
    factor_s, factor_t = (
        torch.linalg.cholesky(c * torch.outer(d, d) + ridge)
        for c, d in ((student, deviation_s), (teacher, deviation_t))
    )
    half = torch.linalg.solve_triangular(
        factor_s, cross * torch.outer(deviation_s, deviation_t), upper=False
    )
    whitened = torch.linalg.solve_triangular(factor_t, half.T, upper=False)
    return torch.linalg.svdvals(whitened).sum() / num_directions


def _all_reduce(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(tensor, group=group)
    return tensor


class _Moments:
    """Of all tokens of the group: their number, means `[2, d]`, covariances `[3, d, d]`."""

    def __init__(self, student: Tensor, teacher: Tensor, group: ProcessGroup | None) -> None:
        number = student.new_tensor([len(student)])
        sums = _all_reduce(torch.cat((student.sum(0), teacher.sum(0), number)), group)
        self.number, self.means = sums[-1], sums[:-1].view(2, -1) / sums[-1]
        # Centred before the products: a difference of large squares would lose fp32's digits.
        x, y = student - self.means[0], teacher - self.means[1]
        products = _all_reduce(torch.stack((x.T @ x, x.T @ y, y.T @ y)), group)
        self.covariances = products / (self.number - 1)


class _AlignByCCA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        teacher: Tensor,
        gradient_scale: Tensor,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        student, target = _as_rows(hidden, teacher)
        moments = _Moments(student, target, group)
        num_directions = min(hidden.shape[-1], teacher.shape[-1])
        with torch.enable_grad():
            of_student, cross = (c.detach().requires_grad_() for c in moments.covariances[:2])
            correlation = mean_canonical_correlation(
                of_student, cross, moments.covariances[2], num_directions
            )
            gradients = torch.autograd.grad(correlation, (of_student, cross))
        # Each token's share of N * mean correlation, N over N - 1 from the covariances.
        share = moments.number / (moments.number - 1)
        ctx.save_for_backward(
            hidden, teacher, gradient_scale, moments.means, share, torch.stack(gradients)
        )
        values = correlation.detach().expand(hidden.shape[:-1]).clone()
        ctx.mark_non_differentiable(values)
        return hidden.detach(), values

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_hidden: Tensor, grad_values: Tensor
    ) -> tuple[Tensor, None, None, None]:
        hidden, teacher, gradient_scale, means, share, (of_student, cross) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = hidden.detach().to(work_dtype(hidden)).requires_grad_()
            student, target = _as_rows(leaf, teacher)
            # d corr / d x = (G_ss + G_ss^T) (x - mean) + G_st (y - mean), both over N - 1.
            direction = (student.detach() - means[0]) @ (of_student + of_student.T)
            direction += (target - means[1]) @ cross.T
            (gradient,) = torch.autograd.grad(student, leaf, direction * share)
        return (grad_hidden - gradient * gradient_scale).to(hidden.dtype), None, None, None


def _as_rows(hidden: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Interpolated student and teacher, `[n, d_T]` each, in the dtype to work in."""
    dtype, width = work_dtype(hidden), teacher.shape[-1]
    return interpolate(hidden.to(dtype), width).flatten(0, -2), teacher.to(dtype).flatten(0, -2)


def align_by_cca(
    hidden: Tensor, teacher: Tensor, gradient_scale: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Pass the hidden state on unchanged, and in the backward raise the canonical correlations.

    The backward is `grad_out - gradient_scale * d(N * correlation) / d hidden`, `N` the tokens of
    the microbatch on all ranks, so that the scale of a sum over tokens fits. Covariances are
    summed over the group and differentiated on each rank: two collectives in the forward, none in
    the backward.

    Args:
        hidden: `h_M`, `[..., d_M]`; `[s, b, h]` in Megatron.
        teacher: `h_T`, `[..., d_T]` with the same leading dimensions; it gets no gradient.
        gradient_scale: a 0-dim tensor.
        group: of the ranks that hold other tokens of the microbatch; None for one rank.

    Returns:
        hidden's values in a tensor that is no view; and the mean canonical correlation, the same
        for each token, `[...]`, with no gradient.
    """
    return _AlignByCCA.apply(hidden, teacher, gradient_scale, group)
