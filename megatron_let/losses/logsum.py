"""LogSum loss (Miles and Mikolajczyk, AAAI 2024) per token, computed in chunks of tokens."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_let.losses import AlignmentLoss
from megatron_let.losses.cosine import token_cosine
from megatron_let.losses.interpolation import Interpolation, chunks, rows, work_dtype

# Keeps the logarithm finite for equal states; different states give a sum of about 10 d_T.
EPSILON = 1e-6
_NORM_EPSILON = 1e-5


def load(token_group: ProcessGroup | None) -> AlignmentLoss:
    """Return the LogSum loss, which needs no other rank's tokens."""
    return AlignmentLoss(("cosine", "logsum"), logsum_loss)


def logsum_loss(
    hidden: Tensor, teacher: Tensor, scale: Tensor, grad_hidden: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Add the gradient of `log(sum_j |z_s,j - z_t,j|^4 + 1e-6)`, summed over tokens.

    `z` is the state standardised over its features, without a learned scale; the student's is
    interpolated first. The published form standardises each feature over the batch and takes one
    logarithm over batch and features; one per token does not depend on other tokens, and so not on
    how they are sharded. See `LossFunction` for shapes; the reported values are the cosine and the
    loss, which may be negative.
    """
    cosine = token_cosine(hidden, teacher)
    student, target, incoming = rows(hidden), rows(teacher), rows(grad_hidden)
    interpolation, dtype = Interpolation(student, target), work_dtype(student)
    values = torch.empty(student.shape[0], dtype=dtype, device=student.device)
    result = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    for c in chunks(student, target):
        p, t = interpolation.apply(student[c].to(dtype)), target[c].to(dtype)
        values[c], direction = _logsum_and_gradient(p, t)
        result[c] = incoming[c] + interpolation.transpose(direction).mul_(scale)
    return result.view(hidden.shape), [cosine, values.view(hidden.shape[:-1])]


def _logsum_and_gradient(p: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss per token, `[c]`, and its gradient with respect to `p`, `[c, d_T]`."""
    z, inverse_deviation = _standardise(p)
    difference = z - _standardise(t)[0]
    squared = difference.square()
    total = squared.square().sum(-1, keepdim=True).add_(EPSILON)
    of_z = squared.mul_(difference).mul_(4 / total)
    # Backward of the standardisation: remove the mean and the part along z.
    along = torch.linalg.vecdot(of_z, z)[:, None] / z.shape[-1]
    gradient = of_z.sub_(of_z.mean(-1, keepdim=True)).addcmul_(z, along, value=-1)
    return total.squeeze(-1).log(), gradient.mul_(inverse_deviation)


def _standardise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(x - mean) / deviation` over the last dimension, and `1 / deviation`, `[c, 1]`."""
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    inverse_deviation = variance.add_(_NORM_EPSILON).rsqrt_()
    return (x - mean).mul_(inverse_deviation), inverse_deviation
