"""Discrete-event simulation of one global batch in a pipeline that also runs a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megatron_let.placement.pipeline import Pass, Pipeline


class DeadlockError(RuntimeError):
    """Raised when every stage waits for another stage."""


@dataclass(frozen=True)
class Costs:
    """Cost of one microbatch, in seconds or any other single unit.

    Attributes:
        forward, backward: [num_stages], cost of a stage through all of its model chunks.
        teacher: teacher forward on one rank, on its share of the samples.
        transfer: sending an activation or its gradient to the next stage.
        state_transfer: sending a teacher state to the aligned stage.
        reduce: reducing a stage's gradients and gathering its parameters, as far as its own passes
            do not hide it; the teacher overlaps it.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    teacher: float
    transfer: float = 0.0
    state_transfer: float = 0.0
    reduce: float = 0.0

    @staticmethod
    def uniform(num_stages: int, forward: float, backward: float, teacher: float) -> Costs:
        """Return equal costs for every stage."""
        return Costs((forward,) * num_stages, (backward,) * num_stages, teacher)


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


class Span(NamedTuple):
    """Work of one stage from `start` to `end`.

    For teacher work done ahead, `microbatch` continues past the end of this global batch.
    """

    stage: int
    kind: Literal["forward", "backward", "teacher"]
    microbatch: int
    chunk: int
    start: float
    end: float


class _Teacher(NamedTuple):
    """Teacher forward on one microbatch.

    `ahead` is set for microbatches of the next global batch. `after` is the forward pass whose
    output is sent only once this work is done.
    """

    microbatch: int
    ahead: bool = False
    after: Pass | None = None


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

    A pass starts once the previous pass on its stage has ended and its input has arrived. A
    backward through layer k also needs the teacher state; microbatches that no entry of `stages`
    computes got theirs in the previous batch. Without `stages` there is no teacher.

    Raises:
        DeadlockError: the stages wait for each other.
    """
    programs = [
        _program(pipeline, aligned, stage, stages[stage] if stages else StagePlan())
        for stage in range(pipeline.num_stages)
    ]
    computed = {m for plan in stages for m in (*plan.before, *plan.waiting, *plan.at_forward)}
    return _Run(pipeline, costs, aligned, programs, computed).timeline()


def _program(
    pipeline: Pipeline, aligned: AlignedLayer, stage: int, plan: StagePlan
) -> list[Pass | _Teacher]:
    """Return all work of a stage in execution order."""
    at_forward = set(plan.at_forward)
    program: list[Pass | _Teacher] = [_Teacher(m) for m in plan.before]
    num_forwards = 0
    for work in pipeline.passes(stage):
        if work.kind == "forward":
            at_aligned = AlignedLayer(stage, work.chunk) == aligned
            if at_aligned and work.microbatch in at_forward:
                program.append(_Teacher(work.microbatch))
            num_forwards += 1
        program.append(work)
        if work.kind == "forward" and num_forwards == plan.num_forwards_to_wait:
            program += [_Teacher(m, after=work) for m in plan.waiting]
    return program + [_Teacher(m, ahead=True) for m in plan.after]


class _Run:
    """State of one simulation."""

    def __init__(
        self,
        pipeline: Pipeline,
        costs: Costs,
        aligned: AlignedLayer,
        programs: list[list[Pass | _Teacher]],
        computed: set[int],
    ) -> None:
        self._pipeline, self._costs, self._aligned = pipeline, costs, aligned
        self._programs, self._computed = programs, computed
        self._pass_ends: dict[tuple[int, Pass], float] = {}
        self._state_ends: dict[int, float] = {}
        self._spans: list[list[Span]] = [[] for _ in programs]

    def timeline(self) -> Timeline:
        positions = [0] * len(self._programs)
        while any(at < len(p) for at, p in zip(positions, self._programs, strict=True)):
            before = sum(positions)
            for stage, program in enumerate(self._programs):
                while positions[stage] < len(program) and self._take(
                    stage, program[positions[stage]]
                ):
                    positions[stage] += 1
            if sum(positions) == before:
                raise DeadlockError(f"the stages are blocked at {positions} of their passes")
        return Timeline(self._spans, self._costs.reduce)

    def _take(self, stage: int, work: Pass | _Teacher) -> bool:
        """Run the work if all of its inputs are known; return whether it ran."""
        free = self._spans[stage][-1].end if self._spans[stage] else 0.0
        if isinstance(work, _Teacher):
            self._append(stage, "teacher", self._number(work), 0, free, self._costs.teacher)
            end = self._spans[stage][-1].end
            if not work.ahead:
                sent = self._costs.state_transfer if stage != self._aligned.stage else 0.0
                self._state_ends[work.microbatch] = end + sent
            if work.after is not None:
                self._pass_ends[stage, work.after] = end
            return True
        ready = self._ready(stage, work)
        if ready is None:
            return False
        seconds = self._costs.forward if work.kind == "forward" else self._costs.backward
        duration = seconds[stage] / self._pipeline.num_chunks
        self._append(stage, work.kind, work.microbatch, work.chunk, max(free, ready), duration)
        self._pass_ends[stage, work] = self._spans[stage][-1].end
        return True

    def _number(self, work: _Teacher) -> int:
        return work.microbatch + (self._pipeline.num_microbatches if work.ahead else 0)

    def _ready(self, stage: int, work: Pass) -> float | None:
        """Return the time at which the inputs of a pass arrive; None if not known yet."""
        ready = 0.0
        producer = self._pipeline.producer(work, stage)
        if producer is not None:
            if producer not in self._pass_ends:
                return None
            ready = self._pass_ends[producer]
            ready += self._costs.transfer if producer[0] != stage else 0.0
        if work.kind == "backward" and AlignedLayer(stage, work.chunk) == self._aligned:
            if work.microbatch in self._computed and work.microbatch not in self._state_ends:
                return None
            ready = max(ready, self._state_ends.get(work.microbatch, 0.0))
        return ready

    def _append(
        self,
        stage: int,
        kind: Literal["forward", "backward", "teacher"],
        microbatch: int,
        chunk: int,
        start: float,
        duration: float,
    ) -> None:
        self._spans[stage].append(Span(stage, kind, microbatch, chunk, start, start + duration))
