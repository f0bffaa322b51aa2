"""A teacher on ranks of its own, one global batch ahead of the student."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_let.errors import LETError
from megatron_let.planner.estimate import Request
from megatron_let.planner.memory import Layout

# The group takes whole nodes.
_NODE_RANKS = 8


@dataclass(frozen=True)
class TeacherGroup:
    """The smallest group of whole nodes that keeps up with the student.

    Attributes:
        num_ranks: ranks of the group.
        cost_ratio: GPU time per step relative to a step without a teacher.
    """

    num_ranks: int
    cost_ratio: float


def teacher_group(request: Request, layout: Layout, step_seconds: float) -> TeacherGroup:
    """Size a teacher group whose states arrive one global batch ahead.

    Each rank of the group holds the whole teacher and runs whole samples, so no work is done twice.
    The student's step is that without a teacher; the group's ranks are paid for as long as it runs.

    Args:
        step_seconds: a step without a teacher.

    Raises:
        LETError: the run has no teacher.
    """
    if request.teacher is None:
        raise LETError("A teacher group needs a teacher; give --let-method let.")
    samples = layout.dp * layout.num_microbatches * layout.micro_batch_size
    flops = request.teacher.forward_flops(request.seq_length, logits=False)
    busy = samples * request.seq_length * flops / request.teacher_flops
    num_ranks = math.ceil(busy / step_seconds / _NODE_RANKS) * _NODE_RANKS
    student_ranks = layout.tp * layout.pp * layout.cp * layout.dp
    return TeacherGroup(
        num_ranks=num_ranks,
        cost_ratio=(student_ranks + num_ranks) / student_ranks,
    )
