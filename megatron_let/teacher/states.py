"""The teacher's hidden states of one global batch, on the ranks that need them."""

from __future__ import annotations

import torch

from megatron_let.alignment.sharding import SequenceShard
from megatron_let.teacher.model import Teacher


class AlignedStageStates:
    """Runs the teacher on the stage that owns layer k, for each microbatch as it is asked for.

    A placement of the teacher over the pipeline is another class with these three methods.
    """

    def __init__(self, teacher: Teacher, shard: SequenceShard) -> None:
        self._teacher = teacher
        self.shard = shard
        self._tokens: torch.Tensor | None = None
        self._not_finite: list[torch.Tensor] = []

    def begin(self, tokens: torch.Tensor) -> None:
        """Take the tokens of a global batch, [num_microbatches, b, s] int64."""
        self._tokens = tokens
        self._not_finite = [torch.zeros((), device=tokens.device)] * len(tokens)

    def state(self, microbatch: int) -> torch.Tensor:
        """Teacher state of this rank's tokens, [s_local, b, d_T]; zeros if any is NaN or Inf."""
        assert self._tokens is not None, "state() outside a step"
        state = self._teacher.hidden_state(self._tokens[microbatch])
        # A sum is NaN or Inf if any element is; looked at once a step, without a stop here.
        not_finite = ~state.sum(dtype=torch.float32).isfinite()
        self._not_finite[microbatch] = not_finite.float()
        # Contiguous here, once: the alignment reads it in the forward and in the backward.
        local = self.shard.slice(state.transpose(0, 1)).contiguous()
        return local.masked_fill_(not_finite, 0)

    def end(self) -> torch.Tensor:
        """Forget the tokens; return [num_microbatches], 1 where a state was NaN or Inf."""
        self._tokens = None
        return torch.stack(self._not_finite)
