"""Canonical correlations of hidden states whose tokens may be spread over ranks."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_let.losses import AlignmentLoss
from megatron_let.losses.cosine import token_cosine
from megatron_let.losses.interpolation import Interpolation, rows, work_dtype

# Added to the correlation matrices, whose diagonal is 1.
RIDGE = 1e-3


def load(token_group: ProcessGroup | None) -> AlignmentLoss:
    """Return the CCA loss over the tokens of all ranks of `token_group`."""
    return AlignmentLoss(("cosine", "cca"), partial(cca_loss, group=token_group))


def cca_loss(
    hidden: Tensor,
    teacher: Tensor,
    scale: Tensor,
    grad_hidden: Tensor,
    group: ProcessGroup | None,
) -> tuple[Tensor, list[Tensor]]:
    """Add the gradient of `-N * mean canonical correlation`, N the tokens on all ranks.

    The factor N makes the scale of a sum over tokens fit. Sums and products are reduced over
    `group` (two all-reduces) and differentiated on each rank. See `LossFunction` for shapes; the
    reported values are the cosine and the correlation, which is the same for each token.
    """
    cosine = token_cosine(hidden, teacher)
    interpolation, dtype = Interpolation(hidden, teacher), work_dtype(hidden)
    student = interpolation.apply(rows(hidden).to(dtype))
    moments = _moments(student, rows(teacher).to(dtype), group)
    num_directions = min(hidden.shape[-1], teacher.shape[-1])
    of_moments = mean_correlation(moments.covariances, num_directions)
    correlation, of_student, of_cross = (value.to(dtype) for value in of_moments)
    # d corr / d x = 2 G_ss (x - mean) + G_st (y - mean), both over N - 1 from the covariances.
    factor = -scale * (moments.number / (moments.number - 1))
    direction = moments.student @ of_student.mul_(factor * 2)
    direction.addmm_(moments.teacher, of_cross.mul_(factor).T)
    gradient = interpolation.transpose(direction).add_(rows(grad_hidden)).to(hidden.dtype)
    return gradient.view(hidden.shape), [cosine, correlation.expand(cosine.shape)]


class _Moments(NamedTuple):
    """Centred rows of this rank, `[n, d]` each, and statistics of all tokens of the group."""

    student: Tensor
    teacher: Tensor
    number: Tensor
    covariances: Tensor  # fp64; see `mean_correlation`


def _moments(student: Tensor, teacher: Tensor, group: ProcessGroup | None) -> _Moments:
    number = student.new_tensor([len(student)])
    sums = _all_reduce(torch.cat((student.sum(0), teacher.sum(0), number)), group)
    number, means = sums[-1], sums[:-1].view(2, -1) / sums[-1]
    # Centred before the products: a difference of large squares would lose fp32's digits.
    x, y = student - means[0], teacher - means[1]
    # In fp64, because the factors' condition is up to the features over the ridge.
    wide_x, wide_y = x.double(), y.double()
    products = torch.stack((wide_x.T @ wide_x, wide_x.T @ wide_y, wide_y.T @ wide_y))
    products = _all_reduce(products, group)
    return _Moments(x, y, number, products / (number - 1))


def _all_reduce(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(tensor, group=group)
    return tensor


def mean_correlation(covariances: Tensor, num_directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean canonical correlation and its gradients.

    The correlation is the nuclear norm of the whitened cross covariance `K = L^-1 X M^-T`, with
    `L L^T` and `M M^T` the correlation matrices plus the ridge. Each feature is first divided by
    its standard deviation, which canonical correlations do not depend on, so that one ridge suits
    all of them. With `K = U S V^T`, `P = L^-T U` and `Q = M^-T V`, the gradients with respect to
    `X` and `L L^T` are `P Q^T` and `-P S P^T / 2`.

    Args:
        covariances: `[3, d, d]`, of student and student, student and teacher, teacher and teacher.
        num_directions: the largest number of canonical directions: the smaller width.

    Returns:
        The mean, 0-dim; and its gradients with respect to the first two covariances, `[d, d]` each.
    """
    student, cross, teacher = covariances
    inverse_s, inverse_t = (_inverse_deviation(c.diagonal()) for c in (student, teacher))
    units_s, units_x, units_t = (
        torch.outer(a, b)
        for a, b in ((inverse_s, inverse_s), (inverse_s, inverse_t), (inverse_t, inverse_t))
    )
    scaled_s, scaled_x = student * units_s, cross * units_x
    ridge = RIDGE * torch.eye(len(student), dtype=student.dtype, device=student.device)
    factor_s, factor_t = (torch.linalg.cholesky(c + ridge) for c in (scaled_s, teacher * units_t))
    half = torch.linalg.solve_triangular(factor_s, scaled_x, upper=False)
    whitened = torch.linalg.solve_triangular(factor_t, half.T, upper=False)
    v, values, u_transposed = torch.linalg.svd(whitened, full_matrices=False)
    p = torch.linalg.solve_triangular(factor_s.T, u_transposed.T, upper=True)
    q = torch.linalg.solve_triangular(factor_t.T, v, upper=True)
    of_cross = (p @ q.T).div_(num_directions)
    of_student = ((p * values) @ p.T).div_(-2 * num_directions)
    # Through the division by the student's standard deviations, which its variances determine.
    of_deviation = (of_cross * scaled_x).sum(1) + 2 * (of_student * scaled_s).sum(1)
    of_student.mul_(units_s).diagonal().sub_(of_deviation * inverse_s.square() / 2)
    return values.sum() / num_directions, of_student, of_cross.mul_(units_x)


def _inverse_deviation(variance: Tensor) -> Tensor:
    # A constant feature, which correlates with nothing, gets 0.
    tiny = torch.finfo(variance.dtype).tiny
    return torch.where(variance < tiny, 0, variance.rsqrt())
