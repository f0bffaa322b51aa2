"""Run the teacher on microbatches, with their samples shared among the ranks of a stage."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from megatron.core import parallel_state

from megatron_let.placement.plan import num_microbatches_together, samples_split
from megatron_let.placement.sequence_shard import SequenceShard
from megatron_let.teacher.model import Teacher


class SampleSharing:
    """Runs the teacher on this rank's samples and exchanges the states for this rank's tokens.

    The tensor- and context-parallel ranks of a stage see the same tokens, so each runs the teacher
    on some of the samples only. See `samples_split` for how many ranks share a microbatch; if not
    all do, they run several microbatches at a time.

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

    def num_together(self, micro_batch_size: int) -> int:
        """Return how many microbatches occupy all ranks of the group at once."""
        return num_microbatches_together(len(self._shards), micro_batch_size)

    def state(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the state of one microbatch; see `states`.

        Args:
            tokens: [b, s] int64, the whole microbatch.

        Returns:
            The state [s_local, b, d_T], and a 0-dim fp32 tensor that is 1 if the states of this
            rank's samples had a NaN or Inf, which are then replaced by zeros.
        """
        states, failed = self.states(tokens[None])
        return states[0], failed[0]

    def states(self, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Compute the states of this rank's tokens; every rank of the group calls it.

        The time is that of one rank's samples of one microbatch, whatever the number of these.

        Args:
            tokens: [n, b, s] int64, whole microbatches, at most `num_together`.

        Returns:
            n states [s_local, b, d_T], and an fp32 tensor [n] that is 1 where the states of this
            rank's samples had a NaN or Inf, which are then replaced by zeros.
        """
        num_microbatches, micro_batch_size, _ = tokens.shape
        num_ranks = len(self._shards)
        size = samples_split(num_ranks, micro_batch_size)
        rank = 0 if self._group is None else self._group.rank()
        microbatch = _microbatch(rank // size, num_microbatches)
        state, is_bad = self._run(tokens[microbatch].chunk(size)[rank % size])
        failed = torch.zeros(num_microbatches, device=tokens.device)
        failed[microbatch] = is_bad
        if self._group is None or (size == 1 and num_microbatches == 1):
            # Contiguous, because it is sent or read in the backward.
            return [self._shard.slice(state).contiguous().masked_fill_(is_bad, 0)], failed
        teams = [other // size for other in range(num_ranks)]
        sends = [_sends(teams[rank], team, num_microbatches) for team in teams]
        receives = [_sends(team, teams[rank], num_microbatches) for team in teams]
        targets = itertools.compress(self._shards, sends)
        outgoing = torch.stack([shard.slice(state) for shard in targets]).masked_fill_(is_bad, 0)
        incoming = outgoing.new_empty(sum(receives), *outgoing.shape[1:])
        torch.distributed.all_to_all_single(
            incoming, outgoing, list(map(int, receives)), list(map(int, sends)), group=self._group
        )
        # Per microbatch [size, s_local, b / size, d_T] -> [s_local, b, d_T]
        parts = incoming.split(size)
        return [part.transpose(0, 1).flatten(1, 2).contiguous() for part in parts], failed

    def _run(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the state [s, b, d_T] and whether it is not finite (0-dim bool)."""
        state = self._teacher.hidden_state(tokens)
        # The sum is NaN or Inf if any element is. Read once per step, so no synchronisation here.
        return state.transpose(0, 1), ~state.sum(dtype=torch.float32).isfinite()


def _microbatch(team: int, num_microbatches: int) -> int:
    """Return the microbatch that a team of ranks runs; teams left over repeat the last one."""
    return min(team, num_microbatches - 1)


def _sends(source: int, target: int, num_microbatches: int) -> bool:
    """Return whether a team sends its states to another one, which takes its own from itself."""
    if _microbatch(source, num_microbatches) == _microbatch(target, num_microbatches):
        return source == target
    return source < num_microbatches


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
