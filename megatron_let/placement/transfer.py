"""Teacher states on their way from the stage that computed them to the stage of layer k.

They travel between the ranks of the same tensor-, context- and data-parallel coordinates, in a
process group of their own, so that no order is shared with the schedule's communication. A state is
waited for in a backward pass only. No work before the schedule, and no forward pass that stands
before the place of `waiting`, needs a backward pass that needs a state (`plan` simulates this), so
every wait ends.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from megatron_let.placement.process_groups import new_group_of


class Transfer:
    """Sends and receives of [s_local, b, d_T] between the stages of one pipeline."""

    def __init__(self, owner_stage: int, device: torch.device) -> None:
        """
        Args:
            owner_stage: of layer k.
            device: of the states.
        """
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        ranks = torch.distributed.get_process_group_ranks(pipeline)
        self._group = new_group_of(ranks)
        self._owner_stage = owner_stage
        self._connect(torch.zeros(1, device=device))

    def _connect(self, probe: torch.Tensor) -> None:
        # NCCL makes the connection of a pair at its first message and blocks both until then.
        if self._group.rank() != self._owner_stage:
            torch.distributed.send(probe, group=self._group, group_dst=self._owner_stage)
            return
        for stage in range(self._group.size()):
            if stage != self._owner_stage:
                torch.distributed.recv(probe, group=self._group, group_src=stage)

    def send(self, state: torch.Tensor, tag: int) -> Message:
        """Start to send a contiguous state to the owner."""
        work = torch.distributed.isend(
            state, group=self._group, group_dst=self._owner_stage, tag=tag
        )
        return Message(state, work)

    def receive(self, buffer: torch.Tensor, stage: int, tag: int) -> Message:
        """Start to receive into `buffer` what `stage` sends with this tag."""
        work = torch.distributed.irecv(buffer, group=self._group, group_src=stage, tag=tag)
        return Message(buffer, work)

    def close(self) -> None:
        """Give the process group back."""
        torch.distributed.destroy_process_group(self._group)


class Message:
    """A state that is being sent or received; it keeps the memory until it is waited for."""

    def __init__(self, state: torch.Tensor, work: torch.distributed.Work | None) -> None:
        self._state = state
        self._work = work

    def wait(self) -> torch.Tensor:
        """The state, once it is there (on a GPU: for the current stream)."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._state
