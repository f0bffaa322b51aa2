"""Run the teacher on one microbatch, with its samples shared among the ranks of a stage."""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core import parallel_state

from megatron_let.placement.plan import samples_split
from megatron_let.placement.sequence_shard import SequenceShard
from megatron_let.teacher.model import Teacher


class SampleSharing:
    """Runs the teacher on this rank's samples and exchanges the states for this rank's tokens.

    The tensor- and context-parallel ranks of a stage see the same tokens, so each runs the teacher
    on some of the samples only. See `samples_split` for how many ranks share a microbatch.

    Attributes:
        width: d_T.
    """

    def __init__(
        self,
        teacher: Teacher,
        shard: SequenceShard,
        group: torch.distributed.ProcessGroup | None,
    ) -> None:
        """Store the teacher and derive the shards of the group's ranks.

        Args:
            teacher: the complete teacher on this rank.
            shard: the part of the sequence whose states this rank needs.
            group: Megatron's group of the stage's ranks with the same tokens; None for this rank
                alone.
        """
        self.width = teacher.width
        self._teacher, self._shard, self._group = teacher, shard, group
        self._shards = [shard] if group is None else shards_of_stage(shard, group.size())
        assert group is None or self._shards[group.rank()] == shard, "Megatron's order of ranks"

    def state(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the state of this rank's tokens; every rank of the group calls it.

        Args:
            tokens: [b, s] int64, the whole microbatch.

        Returns:
            The state [s_local, b, d_T], and a 0-dim fp32 tensor that is 1 if the states of this
            rank's samples had a NaN or Inf, which are then replaced by zeros.
        """
        size = samples_split(len(self._shards), len(tokens))
        if self._group is None or size == 1:
            state, failed = self._run(tokens)
            # Contiguous, because it is sent or read in the backward.
            return self._shard.slice(state).contiguous().masked_fill_(failed, 0), failed.float()
        first = self._group.rank() // size * size
        state, failed = self._run(tokens.chunk(size)[self._group.rank() - first])
        sharing = range(first, first + size)
        outgoing = torch.stack([self._shards[rank].slice(state) for rank in sharing])
        outgoing.masked_fill_(failed, 0)
        incoming = torch.empty_like(outgoing)
        # Nothing is exchanged with the other ranks of the group, which share the same samples.
        counts = [int(rank in sharing) for rank in range(len(self._shards))]
        torch.distributed.all_to_all_single(incoming, outgoing, counts, counts, group=self._group)
        # [ranks, s_local, b / ranks, d_T] -> [s_local, b, d_T]
        return incoming.transpose(0, 1).flatten(1, 2).contiguous(), failed.float()

    def _run(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the state [s, b, d_T] and whether it is not finite (0-dim bool)."""
        state = self._teacher.hidden_state(tokens)
        # The sum is NaN or Inf if any element is. Read once per step, so no synchronisation here.
        return state.transpose(0, 1), ~state.sum(dtype=torch.float32).isfinite()


def local_shard(sequence_parallel: bool) -> SequenceShard:
    """Return this rank's part of the sequence.

    Args:
        sequence_parallel: whether tensor-parallel ranks hold different tokens; if not, each of
            them holds all tokens of its context-parallel rank.
    """
    return SequenceShard(
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        sp_size=parallel_state.get_tensor_model_parallel_world_size() if sequence_parallel else 1,
        sp_rank=parallel_state.get_tensor_model_parallel_rank() if sequence_parallel else 0,
    )


def shards_of_stage(shard: SequenceShard, num_ranks: int) -> list[SequenceShard]:
    """Return the shards of the ranks that have one rank's tokens, in the order of their group.

    Tensor-parallel ranks are consecutive in Megatron's group, whatever the order of the others.

    Args:
        shard: any of them.
    """
    tensor_parallel = num_ranks // shard.cp_size
    return [
        replace(shard, cp_rank=rank // tensor_parallel, sp_rank=rank % shard.sp_size)
        for rank in range(num_ranks)
    ]


def stage_ranks() -> torch.distributed.ProcessGroup | None:
    """Return Megatron's group of this stage's ranks with the same tokens; None for one rank."""
    group = parallel_state.get_tensor_and_context_parallel_group()
    return group if group.size() > 1 else None
