"""What each stage does in one global batch: passes, teacher work, and messages, in order.

The order is that of Megatron's pipeline schedules and of `TeacherStateBuffer`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_let.placement.pipeline import Pass, Pipeline


@dataclass(frozen=True)
class StagePlan:
    """Microbatches whose teacher states one stage computes, by time.

    Attributes:
        before: microbatches of this global batch, before the schedule starts.
        waiting: microbatches of this global batch, after forward pass number
            `num_forwards_to_wait`, where the schedule would wait for its first gradient.
        at_forward: microbatches of this global batch, just before their forward; on the aligned
            stage only.
        after: microbatches of the next global batch, after the last backward.
        num_forwards_to_wait: 1-based number of the forward pass that `waiting` follows.
    """

    before: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()
    at_forward: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    num_forwards_to_wait: int = 1


class AlignedLayer(NamedTuple):
    """Pipeline stage and model chunk of layer k."""

    stage: int
    chunk: int = 0


class TeacherState(NamedTuple):
    """Teacher state of a microbatch of this global batch, or of the next one (`ahead`)."""

    microbatch: int
    ahead: bool = False


class TeacherRun(NamedTuple):
    """Forward of the teacher on microbatches that the ranks of a stage run at once."""

    microbatches: tuple[int, ...]
    ahead: bool = False


class Message(NamedTuple):
    """Output of a pass, or a teacher state, on its way between two stages."""

    source: int
    target: int
    content: Pass | TeacherState


class Step(NamedTuple):
    """Messages of a stage: post them without waiting, wait for them, or both."""

    kind: Literal["post", "wait", "communicate"]
    messages: tuple[Message, ...]


# A pass, a forward of the teacher, or messages.
Item = Pass | TeacherRun | Step


def stage_program(
    pipeline: Pipeline,
    aligned: AlignedLayer,
    stages: Sequence[StagePlan],
    stage: int,
    num_together: int = 1,
) -> Iterator[Item]:
    """Yield what one stage does in a global batch.

    Args:
        stages: the teacher's work; microbatches that none of them computes for this batch got
            their states in the previous one.
        num_together: microbatches that the ranks of a stage run at once. The messages and their
            order do not depend on it.
    """
    mine, is_aligned = stages[stage], stage == aligned.stage

    def computed(microbatches: tuple[int, ...], ahead: bool) -> Iterator[Item]:
        for some in itertools.batched(microbatches, num_together):
            yield TeacherRun(some, ahead)
            for microbatch in some:
                state = TeacherState(microbatch, ahead)
                yield Step("post", (Message(stage, aligned.stage, state),))

    due = {m: s for s, plan in enumerate(stages) for m in (*plan.before, *plan.waiting)}
    ahead = {m: s for s, plan in enumerate(stages) for m in plan.after}
    at_forward = dict.fromkeys(mine.at_forward)
    if is_aligned:
        yield from _receives(due, stage, False)
    yield from computed(mine.before, False)
    num_forwards = 0
    for item in _schedule(pipeline, stage):
        if isinstance(item, Step):
            yield item
            continue
        through_k = AlignedLayer(stage, item.chunk) == aligned
        if item.kind == "backward":
            if through_k and item.microbatch in due:
                state = TeacherState(item.microbatch)
                yield Step("wait", (Message(due[item.microbatch], stage, state),))
            yield item
            continue
        if through_k and item.microbatch in at_forward:
            run = tuple(itertools.islice(at_forward, num_together))
            yield TeacherRun(run)
            for microbatch in run:
                del at_forward[microbatch]
        yield item
        num_forwards += 1
        if num_forwards == mine.num_forwards_to_wait:
            yield from computed(mine.waiting, False)
    if is_aligned:
        yield from _receives(ahead, stage, True)
    yield from computed(mine.after, True)


def last_messages(
    aligned: AlignedLayer, stages: Sequence[StagePlan], stage: int
) -> tuple[Message, ...]:
    """Return what a stage waits for before the next batch, which begins with collectives."""
    return tuple(
        Message(source, aligned.stage, TeacherState(microbatch, ahead=True))
        for source, plan in enumerate(stages)
        for microbatch in plan.after
        if stage in (source, aligned.stage)
    )


def _receives(sources: dict[int, int], stage: int, ahead: bool) -> Iterator[Step]:
    for microbatch, source in sorted(sources.items()):
        if source != stage:
            yield Step("post", (Message(source, stage, TeacherState(microbatch, ahead)),))


def _schedule(pipeline: Pipeline, stage: int) -> Iterator[Step | Pass]:
    """Yield the passes of a stage with Megatron's communication between them.

    A stage waits for each communication (`forward_backward_pipelining_*` without
    `overlap_p2p_comm`; with it, sends are not waited for, which can only complete earlier).
    """
    warmup = pipeline.num_warmup(stage)
    num_pairs = pipeline.num_microbatches * pipeline.num_chunks - warmup
    is_interleaved = pipeline.num_chunks > 1
    # Interleaved, one communication surrounds a forward and a backward.
    sizes = [1] * warmup + ([2] * num_pairs if is_interleaved else [1] * 2 * num_pairs)
    sizes += [1] * warmup
    steady = range(warmup + 1, warmup + 2 * num_pairs)
    passes = iter(pipeline.passes(stage))
    outputs: list[Message] = []
    for index, size in enumerate([*sizes, 0]):
        group = list(itertools.islice(passes, size))
        inputs = [message for work in group for message in _input(pipeline, work, stage)]
        if is_interleaved or index in steady:
            yield Step("communicate", (*outputs, *inputs))
        else:
            yield Step("communicate", tuple(outputs))
            yield Step("communicate", tuple(inputs))
        yield from group
        outputs = [message for work in group for message in _output(pipeline, work, stage)]


def _input(pipeline: Pipeline, work: Pass, stage: int) -> list[Message]:
    """Return the message that brings the input of a pass; none if this stage produces it."""
    producer = pipeline.producer(work, stage)
    if producer is None or producer[0] == stage:
        return []
    return [Message(producer[0], stage, producer[1])]


def _output(pipeline: Pipeline, work: Pass, stage: int) -> list[Message]:
    """Return the message that carries the output of a pass; none if this stage consumes it."""
    step = 1 if work.kind == "forward" else -1
    target, chunk = stage + step, work.chunk
    if not 0 <= target < pipeline.num_stages:
        target, chunk = target % pipeline.num_stages, chunk + step
    if target == stage or not 0 <= chunk < pipeline.num_chunks:
        return []
    return [Message(stage, target, work)]
