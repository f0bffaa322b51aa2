"""A learned linear layer from the student's width to the teacher's, with its own Adam."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.adam import adam

from megatron_let.losses import AlignmentLoss
from megatron_let.losses.interpolation import work_dtype

# --seed alone would draw the numbers that the student's embedding begins with.
_SEED_OFFSET = 7919


@dataclass(frozen=True)
class AdamStep:
    """Hyperparameters of one update, as Megatron's optimizer has them for a matrix at that step."""

    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    decoupled_weight_decay: bool


class LearnedProjection(torch.nn.Module):
    """`W`, `[d_T, d_M]` in fp32 without a bias, and the state of its optimizer.

    All of them are buffers, so that Megatron's data parallelism, its optimizers and its gradient
    norm, which take parameters, know nothing of W, and its checkpoints hold all of it.

    Attributes:
        weight: W, the same on every rank of the stage.
        exp_avg, exp_avg_sq, step: Adam's moments, and its count of updates, `[1]`.
        gradient: sum over this rank's tokens, in no checkpoint.
    """

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    gradient: Tensor

    def __init__(
        self, student_width: int, teacher_width: int, std: float, seed: int, device: torch.device
    ) -> None:
        """
        Args:
            student_width, teacher_width: d_M and d_T.
            std: of the normal distribution that W begins with; the student's own.
            seed: `--seed`; no other generator is advanced.
            device: of the hidden states.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed + _SEED_OFFSET)
        shape = (teacher_width, student_width)
        weight = torch.empty(shape, dtype=torch.float32).normal_(0, std, generator=generator)
        self.register_buffer("weight", weight.to(device))
        for name in ("exp_avg", "exp_avg_sq"):
            self.register_buffer(name, torch.zeros_like(self.weight))
        # Not of 0 dimensions, which torch's planner cannot read a part of.
        self.register_buffer("step", torch.zeros(1, dtype=torch.float32, device=device))
        self.register_buffer("gradient", torch.zeros_like(self.weight), persistent=False)

    def update(self, scale: float, group: ProcessGroup, settings: AdamStep) -> None:
        """Sum the gradient over the ranks that hold tokens, and take one step of Adam.

        Args:
            scale: of the summed gradient: lambda(s) over the tokens of the global batch.
            group: the stage's ranks that hold different tokens.
            settings: of this step.
        """
        if group.size() > 1:
            torch.distributed.all_reduce(self.gradient, group=group)
        adam(
            [self.weight],
            [self.gradient.mul_(scale)],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.step.view(())],
            amsgrad=False,
            maximize=False,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            beta1=settings.beta1,
            beta2=settings.beta2,
            eps=settings.epsilon,
            decoupled_weight_decay=settings.decoupled_weight_decay,
        )


def behind_projection(loss: AlignmentLoss, projection: LearnedProjection) -> AlignmentLoss:
    """Return the loss on the projected state `p = W h` in place of the interpolated state.

    With g the gradient of the loss with respect to p, the gradient of hidden is
    `grad_hidden + scale * g W`; `projection.gradient` is increased by `g^T h`, without the scale.
    Both are computed in fp32 (fp64 for fp64). As p is as wide as the teacher, nothing is
    interpolated; the reported values are those of the loss on p.
    """

    def projected(
        hidden: Tensor, teacher: Tensor, scale: Tensor, grad_hidden: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        dtype = work_dtype(hidden)
        rows, weight = hidden.flatten(0, -2).to(dtype), projection.weight.to(dtype)
        state = (rows @ weight.T).view(*hidden.shape[:-1], -1)
        one, zeros = state.new_ones(()), torch.zeros_like(state)
        direction, values = loss.function(state, teacher, one, zeros)
        direction = direction.flatten(0, -2)
        projection.gradient += direction.T @ rows
        del rows, state, zeros  # the peak comes next
        gradient = (direction @ weight).mul_(scale).view(hidden.shape)
        return gradient.add_(grad_hidden).to(hidden.dtype), values

    return AlignmentLoss(loss.names, projected)
