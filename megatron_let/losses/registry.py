"""What pulls the student's layer towards the teacher's: one entry for each `--let-loss`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from megatron_let.config.let_config import Loss
from megatron_let.losses import (
    Align,
    align_by_cca,
    align_by_logsum,
    align_hidden_state,
    interpolated_cosine,
)


@dataclass(frozen=True)
class AlignmentLoss:
    """A loss on the hidden state, which enters as a gradient.

    Attributes:
        names: of the numbers that `align` gives for each token; the cosine is the first.
        align: returns the hidden state, to be passed on, and those numbers, `[s, b]` each.
    """

    names: tuple[str, ...]
    align: Align


def alignment_loss(name: Loss, token_group: ProcessGroup | None) -> AlignmentLoss:
    """The loss of this name.

    Args:
        name: a value of `--let-loss`.
        token_group: ranks that hold other tokens of the same microbatch; None for one rank.
    """
    if name == "cosine":
        return AlignmentLoss(("cosine",), _align_by_cosine)
    if name == "logsum":
        return AlignmentLoss(("cosine", name), _with_cosine(align_by_logsum))
    return AlignmentLoss(
        ("cosine", name), _with_cosine(functools.partial(align_by_cca, group=token_group))
    )


def _align_by_cosine(
    hidden: torch.Tensor, teacher: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    hidden, cosine = align_hidden_state(hidden, teacher, scale)
    return hidden, [cosine]


def _with_cosine(align: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Align:
    """Report the cosine too, so that runs with different losses can be compared."""

    def aligned(
        hidden: torch.Tensor, teacher: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with torch.no_grad():
            cosine = interpolated_cosine(hidden.flatten(0, -2), teacher.flatten(0, -2))
        hidden, values = align(hidden, teacher, scale)
        return hidden, [cosine.view(hidden.shape[:-1]), values]

    return aligned
