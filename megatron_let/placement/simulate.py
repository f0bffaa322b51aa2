"""A discrete-event simulation of one global batch in a pipeline with a teacher in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megatron_let.placement.pipeline import Pass, Pipeline


class DeadlockError(RuntimeError):
    """Every stage waits for another one."""


@dataclass(frozen=True)
class Costs:
    """Seconds (or any one unit) for one microbatch.

    Attributes:
        forward, backward: of each stage, through all of its model chunks; [num_stages].
        teacher: on one rank, after its tensor- and context-parallel peers have taken their share.
        transfer: of an activation or its gradient to the next stage.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    teacher: float
    transfer: float = 0.0

    @staticmethod
    def uniform(num_stages: int, forward: float, backward: float, teacher: float) -> Costs:
        """The same costs on every stage."""
        return Costs((forward,) * num_stages, (backward,) * num_stages, teacher)


@dataclass(frozen=True)
class StagePlan:
    """The microbatches whose teacher states one stage computes, and when.

    Attributes:
        before: of this global batch, before the schedule starts.
        waiting: of this global batch, after the forward pass number `num_forwards_to_wait`,
            where the schedule would wait for its first gradient.
        at_forward: of this global batch, just before their forward; on the owner only.
        after: of the next global batch, after the last backward.
        num_forwards_to_wait: 1-based number of the forward pass that `waiting` follows.
    """

    before: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()
    at_forward: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    num_forwards_to_wait: int = 1


class Owner(NamedTuple):
    """Where layer k is."""

    stage: int
    chunk: int = 0


class Span(NamedTuple):
    """Something that a stage did from `start` to `end`.

    `microbatch` counts on into the next global batch for teacher work done ahead.
    """

    stage: int
    kind: Literal["forward", "backward", "teacher"]
    microbatch: int
    chunk: int
    start: float
    end: float


class _Teacher(NamedTuple):
    """The teacher's pass over one microbatch.

    `ahead` where it is of the next global batch; `after` the forward pass whose output is sent
    only when this work is done.
    """

    microbatch: int
    ahead: bool = False
    after: Pass | None = None


@dataclass
class Timeline:
    """What every stage did in one global batch, from time 0."""

    spans: list[list[Span]]
    duration: float = field(init=False)

    def __post_init__(self) -> None:
        self.duration = max(spans[-1].end for spans in self.spans if spans)

    def idle(self, stage: int) -> IdleTimes:
        """The gaps of a stage that teacher work can fill."""
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
    pipeline: Pipeline, costs: Costs, owner: Owner, stages: Sequence[StagePlan] = ()
) -> Timeline:
    """Run one global batch.

    A pass starts when the one before it on its stage has ended and its input is there; a backward
    through layer k needs the teacher's state, which the microbatches that no stage of `stages`
    computes have from the batch before. Without `stages` there is no teacher.

    Raises:
        DeadlockError: the stages wait for each other.
    """
    programs = [
        _program(pipeline, owner, stage, stages[stage] if stages else StagePlan())
        for stage in range(pipeline.num_stages)
    ]
    computed = {m for plan in stages for m in (*plan.before, *plan.waiting, *plan.at_forward)}
    return _Run(pipeline, costs, owner, programs, computed).timeline()


def _program(
    pipeline: Pipeline, owner: Owner, stage: int, plan: StagePlan
) -> list[Pass | _Teacher]:
    """Everything that a stage does, in its order."""
    at_forward = set(plan.at_forward)
    program: list[Pass | _Teacher] = [_Teacher(m) for m in plan.before]
    num_forwards = 0
    for work in pipeline.passes(stage):
        if work.kind == "forward":
            at_owner = Owner(stage, work.chunk) == owner
            if at_owner and work.microbatch in at_forward:
                program.append(_Teacher(work.microbatch))
            num_forwards += 1
        program.append(work)
        if work.kind == "forward" and num_forwards == plan.num_forwards_to_wait:
            program += [_Teacher(m, after=work) for m in plan.waiting]
    return program + [_Teacher(m, ahead=True) for m in plan.after]


class _Run:
    """The state of one simulation."""

    def __init__(
        self,
        pipeline: Pipeline,
        costs: Costs,
        owner: Owner,
        programs: list[list[Pass | _Teacher]],
        computed: set[int],
    ) -> None:
        self._pipeline, self._costs, self._owner = pipeline, costs, owner
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
                raise DeadlockError(f"the stages stand at {positions} of their passes")
        return Timeline(self._spans)

    def _take(self, stage: int, work: Pass | _Teacher) -> bool:
        """Do the work if everything that it needs is known; return whether it was done."""
        free = self._spans[stage][-1].end if self._spans[stage] else 0.0
        if isinstance(work, _Teacher):
            self._append(stage, "teacher", self._number(work), 0, free, self._costs.teacher)
            end = self._spans[stage][-1].end
            if not work.ahead:
                self._state_ends[work.microbatch] = end
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
        """When the inputs of a pass are there; None if that is not known yet."""
        ready = 0.0
        producer = self._pipeline.producer(work, stage)
        if producer is not None:
            if producer not in self._pass_ends:
                return None
            ready = self._pass_ends[producer]
            ready += self._costs.transfer if producer[0] != stage else 0.0
        if work.kind == "backward" and Owner(stage, work.chunk) == self._owner:
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
