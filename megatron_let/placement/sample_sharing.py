"""The teacher's state of one microbatch, its samples shared among the ranks of a stage."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from megatron_let.placement.plan import samples_split
from megatron_let.placement.process_groups import new_group_of
from megatron_let.placement.sequence_shard import SequenceShard
from megatron_let.teacher.model import Teacher


class SharedSamples:
    """Runs the teacher on this rank's samples and swaps them for this rank's tokens.

    The tensor- and context-parallel ranks of a stage see the same tokens, so each of them runs the
    teacher on some samples only; as many of them as divide the microbatch (the greatest common
    divisor), and where that is 1 each runs all of it.

    Attributes:
        width: d_T.
    """

    def __init__(
        self,
        teacher: Teacher,
        shard: SequenceShard,
        group: torch.distributed.ProcessGroup | None,
    ) -> None:
        """
        Args:
            teacher: whole, on this rank.
            shard: tokens of the student's hidden state that this rank holds.
            group: of `samples_group`; this object gives it back.
        """
        self.width = teacher.width
        self._teacher, self._shard, self._group = teacher, shard, group
        self._shards = [shard]
        if group is not None:
            self._shards = [shard] * group.size()
            torch.distributed.all_gather_object(self._shards, shard, group=group)

    def state(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens [b, s] -> state of this rank's tokens [s_local, b, d_T], and whether it failed.

        The second is a 0-dim fp32 tensor, 1 where this rank's samples had a NaN or Inf; their
        states are then zeros.
        """
        if self._group is None:
            state, failed = self._run(tokens)
            # Contiguous once here: it is sent, or read in the backward.
            return self._shard.slice(state).contiguous().masked_fill_(failed, 0), failed.float()
        share = tokens.chunk(self._group.size())[self._group.rank()]
        state, failed = self._run(share)
        outgoing = torch.stack([shard.slice(state) for shard in self._shards])
        outgoing.masked_fill_(failed, 0)
        incoming = torch.empty_like(outgoing)
        torch.distributed.all_to_all_single(incoming, outgoing, group=self._group)
        # [ranks, s_local, b / ranks, d_T] -> [s_local, b, d_T]
        return incoming.transpose(0, 1).flatten(1, 2).contiguous(), failed.float()

    def _run(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens [b, s] -> state [s, b, d_T], and whether it is not finite, 0-dim bool."""
        state = self._teacher.hidden_state(tokens)
        # A sum is NaN or Inf if any element is; looked at once a step, without a stop here.
        return state.transpose(0, 1), ~state.sum(dtype=torch.float32).isfinite()

    def close(self) -> None:
        """Give the process group back."""
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
            self._group = None


def samples_group(micro_batch_size: int) -> torch.distributed.ProcessGroup | None:
    """The ranks that share a microbatch's samples with this one; None where there is no other.

    Every rank of the job calls it, also on stages that never run the teacher.
    """
    ranks = _peers(micro_batch_size)
    return new_group_of(ranks) if len(ranks) > 1 else None


def _peers(micro_batch_size: int) -> list[int]:
    """Global ranks that share the samples of a microbatch with this one, itself included."""
    group = parallel_state.get_tensor_and_context_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    size = samples_split(len(ranks), 1, micro_batch_size)
    first = group.rank() // size * size
    return ranks[first : first + size]
