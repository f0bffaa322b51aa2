"""Discrete-event simulation of one global batch in a pipeline that also runs a teacher."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megatron_let.placement.pipeline import Pass, Pipeline
from megatron_let.placement.program import (
    AlignedLayer,
    Item,
    Message,
    StagePlan,
    Step,
    TeacherRun,
    stage_program,
)


class DeadlockError(RuntimeError):
    """Raised when every stage waits for another stage."""


@dataclass(frozen=True)
class Costs:
    """Cost of one microbatch, in seconds or any other single unit.

    Attributes:
        forward, backward: [num_stages], cost of a stage through all of its model chunks.
        teacher: teacher forward of the ranks of a stage, on up to `num_together` microbatches.
        transfer: sending an activation or its gradient to the next stage.
        state_transfer: sending a teacher state to the aligned stage.
        reduce: reducing a stage's gradients and gathering its parameters, as far as its own passes
            do not hide it; the teacher overlaps it.
        num_together: see `num_microbatches_together`.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    teacher: float
    transfer: float = 0.0
    state_transfer: float = 0.0
    reduce: float = 0.0
    num_together: int = 1

    @staticmethod
    def uniform(num_stages: int, forward: float, backward: float, teacher: float) -> Costs:
        """Return equal costs for every stage."""
        return Costs((forward,) * num_stages, (backward,) * num_stages, teacher)


class Span(NamedTuple):
    """Work of one stage from `start` to `end`.

    For teacher work, `microbatch` is the first one; done ahead, it continues past the end of this
    global batch.
    """

    stage: int
    kind: Literal["forward", "backward", "teacher"]
    microbatch: int
    chunk: int
    start: float
    end: float


@dataclass
class Timeline:
    """Work of every stage in one global batch, from time 0.

    Attributes:
        reduce: `Costs.reduce`.
    """

    spans: list[list[Span]]
    reduce: float = 0.0
    duration: float = field(init=False)

    def __post_init__(self) -> None:
        self.duration = max(self._end(spans) for spans in self.spans if spans)

    def _end(self, spans: list[Span]) -> float:
        passes = (span.end for span in reversed(spans) if span.kind != "teacher")
        return max(spans[-1].end, next(passes, 0.0) + self.reduce)

    def idle(self, stage: int) -> IdleTimes:
        """Return the idle times of a stage that teacher work can fill."""
        spans = self.spans[stage]
        first = next(i for i, span in enumerate(spans) if span.kind == "backward")
        return IdleTimes(
            start=spans[0].start,
            waiting=max(0.0, spans[first].start - spans[first - 1].end),
            end=self.duration - spans[-1].end,
        )


class IdleTimes(NamedTuple):
    """Idle time before the first pass, before the first backward, and after the last pass."""

    start: float
    waiting: float
    end: float


def simulate(
    pipeline: Pipeline, costs: Costs, aligned: AlignedLayer, stages: Sequence[StagePlan] = ()
) -> Timeline:
    """Simulate one global batch.

    A message arrives once both stages have posted it, as under NCCL and gloo: a stage whose output
    is not yet awaited waits, except in an interleaved schedule with `overlap_p2p`. Microbatches
    that no entry of `stages` computes got their teacher states in the previous batch. Without
    `stages` there is no teacher.

    Raises:
        DeadlockError: the stages wait for each other.
    """
    plans = stages or [StagePlan()] * pipeline.num_stages
    messages: dict[Message, _Arrival] = defaultdict(_Arrival)
    runs = [
        _Stage(
            pipeline,
            costs,
            stage,
            list(stage_program(pipeline, aligned, plans, stage, costs.num_together)),
        )
        for stage in range(pipeline.num_stages)
    ]
    # Lists, not generators: every stage advances in every round.
    while any([run.advance(messages) for run in runs]):
        pass
    if not all(run.is_complete for run in runs):
        raise DeadlockError(f"the stages are blocked at {[len(run.spans) for run in runs]} spans")
    return Timeline([run.spans for run in runs], costs.reduce)


@dataclass
class _Arrival:
    """Number of stages that have posted a message, and the time of the last one."""

    num_posted: int = 0
    seconds: float = 0.0


class _Stage:
    """Progress of one stage through its program."""

    def __init__(self, pipeline: Pipeline, costs: Costs, stage: int, program: list[Item]) -> None:
        self._pipeline, self._costs, self._stage = pipeline, costs, stage
        self._program = program
        self._position, self._is_posted, self._now = 0, False, 0.0
        self._waits_for_sends = pipeline.num_chunks == 1 or not pipeline.overlap_p2p
        self.spans: list[Span] = []

    @property
    def is_complete(self) -> bool:
        return self._position == len(self._program)

    def advance(self, messages: dict[Message, _Arrival]) -> bool:
        """Run until a message is missing; return whether anything changed."""
        changed = False
        while not self.is_complete:
            item = self._program[self._position]
            if not isinstance(item, Step):
                self._work(item)
            else:
                if item.kind != "wait" and not self._is_posted:
                    self._post(item.messages, messages)
                    changed = True
                if item.kind != "post" and not self._wait(item.messages, messages):
                    break
            self._position, self._is_posted, changed = self._position + 1, False, True
        return changed

    def _work(self, item: Pass | TeacherRun) -> None:
        start = self._now
        if isinstance(item, TeacherRun):
            self._now += self._costs.teacher
            number = item.microbatches[0] + item.ahead * self._pipeline.num_microbatches
            self.spans.append(Span(self._stage, "teacher", number, 0, start, self._now))
            return
        seconds = self._costs.forward if item.kind == "forward" else self._costs.backward
        self._now += seconds[self._stage] / self._pipeline.num_chunks
        self.spans.append(
            Span(self._stage, item.kind, item.microbatch, item.chunk, start, self._now)
        )

    def _post(self, posted: Sequence[Message], messages: dict[Message, _Arrival]) -> None:
        self._is_posted = True
        for message in posted:
            arrival = messages[message]
            # A state that its own stage uses needs no second stage.
            arrival.num_posted += 2 if message.source == message.target else 1
            arrival.seconds = max(arrival.seconds, self._now)

    def _wait(self, awaited: Sequence[Message], messages: dict[Message, _Arrival]) -> bool:
        """Advance to the time at which all messages have arrived; return False if unknown."""
        for message in awaited:
            is_received = message.target == self._stage
            if not (is_received or self._waits_for_sends):
                continue
            if messages[message].num_posted < 2:
                return False
            # The bytes are on their way while the sender continues.
            transfer = self._transfer(message) if is_received else 0.0
            self._now = max(self._now, messages[message].seconds + transfer)
        return True

    def _transfer(self, message: Message) -> float:
        if isinstance(message.content, Pass):
            return self._costs.transfer
        return self._costs.state_transfer if message.source != message.target else 0.0
