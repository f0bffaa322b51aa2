"""Run the teacher on one microbatch, with its samples shared among the ranks of a stage."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from megatron_let.placement.plan import samples_split
from megatron_let.placement.sequence_shard import SequenceShard
from megatron_let.placement.transfer import new_group_of
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
        """Store the teacher and gather the shards of the group's ranks.

        Args:
            teacher: the complete teacher on this rank.
            shard: the part of the sequence whose states this rank needs.
            group: group from `samples_group`; `close` destroys it.
        """
        self.width = teacher.width
        self._teacher, self._shard, self._group = teacher, shard, group
        self._shards = [shard]
        if group is not None:
            self._shards = [shard] * group.size()
            torch.distributed.all_gather_object(self._shards, shard, group=group)

    def state(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the state of this rank's tokens; every rank of the group calls it.

        Args:
            tokens: [b, s] int64, the whole microbatch.

        Returns:
            The state [s_local, b, d_T], and a 0-dim fp32 tensor that is 1 if the states of this
            rank's samples had a NaN or Inf, which are then replaced by zeros.
        """
        if self._group is None:
            state, failed = self._run(tokens)
            # Contiguous, because it is sent or read in the backward.
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
        """Return the state [s, b, d_T] and whether it is not finite (0-dim bool)."""
        state = self._teacher.hidden_state(tokens)
        # The sum is NaN or Inf if any element is. Read once per step, so no synchronisation here.
        return state.transpose(0, 1), ~state.sum(dtype=torch.float32).isfinite()

    def close(self) -> None:
        """Destroy the process group."""
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
            self._group = None


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


def samples_group(
    micro_batch_size: int, has_teacher: bool
) -> torch.distributed.ProcessGroup | None:
    """Create the group of ranks that share a microbatch's samples; None for a single rank.

    Every rank of the job calls it. A stage without the teacher gets no group: one that is destroyed
    at once closes its connections while other ranks still open theirs.
    """
    group = parallel_state.get_tensor_and_context_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    size = samples_split(len(ranks), micro_batch_size)
    first = group.rank() // size * size
    if size == 1:
        return None
    return new_group_of(ranks[first : first + size] if has_teacher else [])
