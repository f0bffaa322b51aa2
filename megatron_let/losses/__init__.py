"""Alignment losses between student and teacher states, their registry, and the hook on layer k.

This package imports torch only once a loss is loaded, so that flags can be parsed without it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

# Values of --let-loss. NAME is the module `megatron_let.losses.NAME`, which defines `load`.
LOSSES = ("cosine", "logsum", "cca")

# CCA needs this many tokens per microbatch and teacher feature; fewer correlate by chance alone.
CCA_TOKENS_PER_FEATURE = 4


class LossFunction(Protocol):
    """A pure function from hidden states to a gradient; the hook calls it in its backward pass."""

    def __call__(
        self, hidden: Tensor, teacher: Tensor, scale: Tensor, grad_hidden: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Add the gradient of the loss to the incoming gradient.

        Args:
            hidden: student's hidden state, `[..., d_M]`; `[s, b, h]` in Megatron.
            teacher: teacher's hidden state, `[..., d_T]` with the same leading dimensions.
            scale: 0-dim tensor on hidden's device, fp32 or fp64; never copied to the host.
            grad_hidden: incoming gradient, `[..., d_M]`; not modified.

        Returns:
            `grad_hidden + scale * d(sum of the loss over tokens) / d hidden`, `[..., d_M]` in
            hidden's dtype; and the reported values, `[...]` each.

        Raises:
            ValueError: the shapes do not match, or `d_T` is below 2.
        """


@dataclass(frozen=True)
class AlignmentLoss:
    """A loss function and the names of what it reports.

    Attributes:
        names: one for each reported value; the first is `cosine`.
        function: see `LossFunction`.
    """

    names: tuple[str, ...]
    function: LossFunction


def load_loss(name: str, token_group: ProcessGroup | None) -> AlignmentLoss:
    """Import a loss by name.

    Args:
        name: one of `LOSSES`.
        token_group: ranks that hold other tokens of the same microbatch; None for one rank.
    """
    loss: AlignmentLoss = importlib.import_module(f"{__name__}.{name}").load(token_group)
    return loss
