"""A teacher on ranks of its own, one global batch ahead of the student."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_let.errors import LETError
from megatron_let.planner.estimate import Request
from megatron_let.planner.memory import Layout, teacher_state


@dataclass(frozen=True)
class TeacherGroup:
    """The smallest group of whole nodes that keeps up with the student.

    Attributes:
        num_ranks: ranks of the group.
        cost_ratio: GPU time per step relative to a step without a teacher.
        receive_seconds: time in which a rank of the aligned stage receives a step's states.
    """

    num_ranks: int
    cost_ratio: float
    receive_seconds: float


def teacher_group(
    request: Request, layout: Layout, step_seconds: float, node_ranks: int = 8
) -> TeacherGroup:
    """Size a teacher group whose states arrive one global batch ahead.

    Each rank of the group holds the whole teacher and runs whole samples, so no work is done twice.
    The student's step is that without a teacher; the group's ranks are paid for as long as it runs.

    Args:
        step_seconds: a step without a teacher.
        node_ranks: ranks of a node, which the group takes whole.

    Raises:
        LETError: the run has no teacher.
    """
    if request.teacher is None:
        raise LETError("A teacher group needs a teacher; give --let-method let.")
    samples = layout.dp * layout.num_microbatches * layout.micro_batch_size
    flops = request.teacher.forward_flops(request.seq_length, logits=False)
    busy = samples * request.seq_length * flops / request.flops
    num_ranks = math.ceil(busy / step_seconds / node_ranks) * node_ranks
    student_ranks = layout.tp * layout.pp * layout.cp * layout.dp
    state = teacher_state(request.teacher, layout, request.seq_length)
    return TeacherGroup(
        num_ranks=num_ranks,
        cost_ratio=(student_ranks + num_ranks) / student_ranks,
        receive_seconds=layout.num_microbatches * state / request.gpu.network,
    )
