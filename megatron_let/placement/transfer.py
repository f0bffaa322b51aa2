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
        """Create a process group and connect the pipeline's ranks; collective over the job.

        Args:
            aligned_stage: pipeline stage of layer k.
        """
        self._pipeline = parallel_state.get_pipeline_model_parallel_group()
        self._ranks = torch.distributed.get_process_group_ranks(self._pipeline)
        # One group of all ranks, not one per pipeline: every rank would have to create every group.
        # NCCL connects only the pairs that exchange messages.
        self._group = torch.distributed.new_group(group_desc="LET_TEACHER_STATES")
        self._aligned_stage = aligned_stage
        self._connect(torch.zeros(1, device=device))

    def _connect(self, probe: torch.Tensor) -> None:
        # NCCL connects a pair at its first message and blocks both ranks until then.
        aligned_rank = self._ranks[self._aligned_stage]
        if self._pipeline.rank() != self._aligned_stage:
            torch.distributed.send(probe, aligned_rank, group=self._group)
            return
        for rank in self._ranks:
            if rank != aligned_rank:
                torch.distributed.recv(probe, rank, group=self._group)

    def send(self, state: torch.Tensor, tag: int) -> Message:
        """Start sending a contiguous state to the aligned stage."""
        aligned_rank = self._ranks[self._aligned_stage]
        work = torch.distributed.isend(state, aligned_rank, group=self._group, tag=tag)
        return Message(state, work)

    def receive(self, buffer: torch.Tensor, stage: int, tag: int) -> Message:
        """Start receiving into `buffer` the state that `stage` sends with this tag."""
        work = torch.distributed.irecv(buffer, self._ranks[stage], group=self._group, tag=tag)
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
