"""Transfer of teacher states from the stage that computed them to the aligned stage.

States travel between ranks with the same tensor-, context- and data-parallel coordinates, in a
separate process group, so that their order is independent of the schedule's communication. Both
ranks post a message before the schedule or after its last backward, never in between, so that no
wait for it can depend on the schedule (rendezvous.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state


class Transfer:
    """Sends and receives states [s_local, b, d_T] between the stages of one pipeline."""

    def __init__(self, aligned_stage: int, device: torch.device) -> None:
        """Create a process group of the pipeline's ranks and connect them.

        Args:
            aligned_stage: pipeline stage of layer k.
        """
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        ranks = torch.distributed.get_process_group_ranks(pipeline)
        group = new_group_of(ranks)
        assert group is not None, "a pipeline has ranks"
        self._group = group
        self._aligned_stage = aligned_stage
        self._connect(torch.zeros(1, device=device))

    def _connect(self, probe: torch.Tensor) -> None:
        # NCCL connects a pair at its first message and blocks both ranks until then.
        if self._group.rank() != self._aligned_stage:
            torch.distributed.send(probe, group=self._group, group_dst=self._aligned_stage)
            return
        for stage in range(self._group.size()):
            if stage != self._aligned_stage:
                torch.distributed.recv(probe, group=self._group, group_src=stage)

    def send(self, state: torch.Tensor, tag: int) -> Message:
        """Start sending a contiguous state to the aligned stage."""
        work = torch.distributed.isend(
            state, group=self._group, group_dst=self._aligned_stage, tag=tag
        )
        return Message(state, work)

    def receive(self, buffer: torch.Tensor, stage: int, tag: int) -> Message:
        """Start receiving into `buffer` the state that `stage` sends with this tag."""
        work = torch.distributed.irecv(buffer, group=self._group, group_src=stage, tag=tag)
        return Message(buffer, work)

    def close(self) -> None:
        """Destroy the process group."""
        torch.distributed.destroy_process_group(self._group)


class Message:
    """A state that is being sent or received; keeps its memory alive until `wait`."""

    def __init__(self, state: torch.Tensor, work: torch.distributed.Work | None) -> None:
        self._state = state
        self._work = work

    def wait(self) -> torch.Tensor:
        """Return the state once it has arrived (on a GPU: for the current stream)."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._state


def new_group_of(ranks: list[int]) -> torch.distributed.ProcessGroup | None:
    """Create a process group of these global ranks; None for no ranks.

    Every rank of the job calls it, with the ranks of its own group or none. (With
    `new_group(use_local_synchronization=True)` no exchange would be needed, but it names groups by
    their ranks and hangs if another group with the same ranks exists.)
    """
    groups: list[list[int]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(groups, ranks)
    distinct = sorted(set(map(tuple, filter(None, groups))))
    mine, _ = torch.distributed.new_subgroups_by_enumeration([list(group) for group in distinct])
    return mine


def without_device_wait(config: Any) -> Callable[[], None]:
    """Let each pipeline communication wait for its own messages only.

    Megatron's `batch_p2p_sync` works around a race in old versions of torch. With it, the first
    communication of the aligned stage would wait for all teacher states of the global batch.

    Args:
        config: the model's config, which Megatron's `P2PCommunicator` reads.

    Returns:
        A function that restores the config.
    """
    restore = functools.partial(setattr, config, "batch_p2p_sync", config.batch_p2p_sync)
    config.batch_p2p_sync = False
    return restore
