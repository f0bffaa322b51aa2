"""Run the entry on gloo under NCCL's rules for the teacher's states.

A send completes only when its receive is posted, and `torch.cuda.synchronize()`, with which each
pipeline communication of Megatron ends, waits for every pending message of the rank. Costs are
fixed, as in `fixed_costs`.

`-m tests.helpers.nccl_rules ARGS`, with the entry's arguments.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

from megatron_let import pretrain
from tests.helpers.fixed_costs import fix_costs

# Messages and acknowledgements that this rank has posted and not waited for.
PENDING: list[Any] = []
ACKNOWLEDGEMENT = 1 << 20


def synchronize(device: Any = None) -> None:
    """Wait for every pending message of this rank."""
    while PENDING:
        PENDING.pop(0).wait()


def use_nccl_rules() -> None:
    """Acknowledge each state when its receive is posted, and make synchronisation wait."""
    from megatron_let.methods import let_context
    from megatron_let.placement.transfer import Message, Transfer

    class Rendezvous(Transfer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            torch.cuda.synchronize = synchronize

        def send(self, state: torch.Tensor, tag: int) -> Message:
            message, answer = super().send(state, tag), torch.zeros(1)
            aligned_rank = self._ranks[self._aligned_stage]
            work = dist.irecv(answer, aligned_rank, group=self._group, tag=ACKNOWLEDGEMENT + tag)
            PENDING.append(Message(answer, work))
            return message

        def receive(self, buffer: torch.Tensor, stage: int, tag: int) -> Message:
            message, answer = super().receive(buffer, stage, tag), torch.ones(1)
            rank = self._ranks[stage]
            work = dist.isend(answer, rank, group=self._group, tag=ACKNOWLEDGEMENT + tag)
            PENDING.extend((message, Message(answer, work)))
            return message

    let_context.Transfer = Rendezvous  # type: ignore[misc]
    # Plans complete also where Megatron's own wait for the device stays.
    let_context.without_device_wait = lambda config: None  # type: ignore[assignment,return-value]


if __name__ == "__main__":
    pretrain.prepare_process(pretrain.detect_host(), 0)
    fix_costs()
    use_nccl_rules()
    sys.exit(pretrain.main())
