"""Which stage runs the teacher on which microbatch, and when: pure functions of sizes and costs."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.simulate import (
    Costs,
    DeadlockError,
    Owner,
    StagePlan,
    simulate,
)

Placement = Literal["aligned-stage", "spread", "bubble"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)

# Durations are sums of floats; a job that fits exactly must not be lost to rounding.
_SLACK = 1e-9


@dataclass(frozen=True)
class Plan:
    """The teacher's work in one global batch.

    Attributes:
        placement: how it was made.
        stages: each stage's share.
    """

    placement: Placement
    stages: tuple[StagePlan, ...]

    @property
    def num_ahead(self) -> int:
        """The microbatches of the next global batch, from 0, that are computed in this one."""
        return sum(len(stage.after) for stage in self.stages)

    def sources(self) -> dict[int, int]:
        """Stage that computes each microbatch of this global batch before its backward."""
        return {
            microbatch: index
            for index, stage in enumerate(self.stages)
            for microbatch in (*stage.before, *stage.waiting, *stage.at_forward)
        }

    def sources_ahead(self) -> dict[int, int]:
        """Stage that computes each of the first microbatches of the next global batch."""
        return {m: index for index, stage in enumerate(self.stages) for m in stage.after}


def samples_split(tp: int, cp: int, micro_batch_size: int) -> int:
    """Ranks of a stage among which the samples of a microbatch are shared.

    The tensor- and context-parallel ranks of a stage see the same tokens. Where their number does
    not divide the microbatch, the largest divisor of both is used and the work is repeated.
    """
    return math.gcd(tp * cp, micro_batch_size)


@functools.lru_cache(maxsize=32)
def plan(
    placement: Placement,
    pipeline: Pipeline,
    costs: Costs,
    owner: Owner,
    *,
    max_prefetch: int,
    num_ready: int = 0,
    look_ahead: bool = True,
) -> Plan:
    """Give every microbatch of a global batch to a stage and a time.

    Args:
        placement: `aligned-stage`: the owner computes each microbatch before its forward;
            `spread`: evenly over the stages, before the schedule starts; `bubble`: in the idle
            times of the stages, the owner's last, and evenly what they cannot hold.
        pipeline: sizes of the schedule.
        costs: of one microbatch; only their ratios count, and only for `bubble`.
        owner: stage and model chunk of layer k.
        max_prefetch: states that the owner may hold before their backward, at least 1.
        num_ready: states of the first microbatches that the batch before has computed.
        look_ahead: whether the next global batch is known and needs the teacher.

    Returns:
        A plan that covers the microbatches from `num_ready` on, and with `look_ahead` the first
        `num_ahead` ones of the next global batch.
    """
    due = range(num_ready, pipeline.num_microbatches)
    if placement == "aligned-stage" or pipeline.num_stages == 1:
        stages = _aligned(pipeline, owner, due)
    elif placement == "spread":
        stages = _spread(pipeline, owner, due)
    else:
        stages = _bubble(pipeline, costs, owner, due, max_prefetch, look_ahead)
    stages = [
        replace(stage, num_forwards_to_wait=pipeline.num_forwards_to_wait(index))
        for index, stage in enumerate(stages)
    ]
    stages[owner.stage] = _within(stages[owner.stage], max_prefetch)
    return Plan(placement, tuple(stages))


def _aligned(pipeline: Pipeline, owner: Owner, due: range) -> list[StagePlan]:
    stages = [StagePlan()] * pipeline.num_stages
    # On one stage the first one runs before the schedule, beside the gathering of parameters.
    before = tuple(due[:1]) if pipeline.num_stages == 1 else ()
    stages[owner.stage] = StagePlan(before=before, at_forward=tuple(due[len(before) :]))
    return stages


def _owner_last(pipeline: Pipeline, owner: Owner) -> list[int]:
    others = [stage for stage in range(pipeline.num_stages) if stage != owner.stage]
    return [*others, owner.stage]


def _spread(pipeline: Pipeline, owner: Owner, due: Iterable[int]) -> list[StagePlan]:
    order = itertools.cycle(_owner_last(pipeline, owner))
    shares: list[list[int]] = [[] for _ in range(pipeline.num_stages)]
    for microbatch, stage in zip(due, order, strict=False):
        shares[stage].append(microbatch)
    return [StagePlan(before=tuple(share)) for share in shares]


def _within(stage: StagePlan, max_prefetch: int) -> StagePlan:
    """Leave to their forward what the owner may not hold from the start."""
    early = {m for m in (*stage.before, *stage.waiting) if m < max_prefetch}
    late = sorted({*stage.before, *stage.waiting} - early)
    return replace(
        stage,
        before=tuple(m for m in stage.before if m in early),
        waiting=tuple(m for m in stage.waiting if m in early),
        at_forward=(*stage.at_forward, *late),
    )


@dataclass
class _Slot:
    """An idle time of a stage, and the number of microbatches that are put into it."""

    stage: int
    when: Literal["before", "waiting", "after"]
    room: float
    count: int = 0


def _bubble(
    pipeline: Pipeline,
    costs: Costs,
    owner: Owner,
    due: range,
    max_prefetch: int,
    look_ahead: bool,
) -> list[StagePlan]:
    """In the idle times; `waiting` only where the stages then do not wait for each other."""
    for with_waiting in (True, False):
        slots = _idle_slots(pipeline, costs, owner, with_waiting)
        ahead = _fill_steady(pipeline, costs, owner, slots, max_prefetch) if look_ahead else []
        now = [replace(slot) for slot in slots if slot.when != "after"]
        _fill(now, len(due), costs.teacher, owner.stage)
        _fill_evenly(now, len(due) - _total(now), owner.stage)
        stages = _number(pipeline, now + ahead, due)
        try:
            simulate(pipeline, costs, owner, stages)
        except DeadlockError:
            continue
        return stages
    raise AssertionError("work before the schedule waits for nothing")


def _idle_slots(pipeline: Pipeline, costs: Costs, owner: Owner, with_waiting: bool) -> list[_Slot]:
    baseline = simulate(pipeline, costs, owner)
    slots = []
    for stage in range(pipeline.num_stages):
        idle = baseline.idle(stage)
        slots.append(_Slot(stage, "before", idle.start))
        if with_waiting:
            slots.append(_Slot(stage, "waiting", idle.waiting))
        slots.append(_Slot(stage, "after", idle.end))
    return slots


def _fill_steady(
    pipeline: Pipeline, costs: Costs, owner: Owner, slots: list[_Slot], max_prefetch: int
) -> list[_Slot]:
    """The share of a whole global batch that the end of the one before it can hold."""
    steady = [replace(slot) for slot in slots]
    _fill(steady, pipeline.num_microbatches, costs.teacher, owner.stage)
    ahead = [slot for slot in steady if slot.when == "after"]
    while _total(ahead) > max_prefetch:
        max(ahead, key=lambda slot: slot.count).count -= 1
    return ahead


def _total(slots: Iterable[_Slot]) -> int:
    return sum(slot.count for slot in slots)


def _fill(slots: list[_Slot], num_microbatches: int, seconds: float, owner_stage: int) -> None:
    """Put microbatches into the roomiest slots while they fit, the owner's slots last."""
    for of_owner in (False, True):
        candidates = [slot for slot in slots if (slot.stage == owner_stage) == of_owner]
        while candidates and _total(slots) < num_microbatches:
            roomiest = max(candidates, key=lambda slot: slot.room)
            if roomiest.room < seconds * (1 - _SLACK):
                break
            roomiest.room -= seconds
            roomiest.count += 1


def _fill_evenly(slots: list[_Slot], num_microbatches: int, owner_stage: int) -> None:
    """Put what no idle time holds on the stages in turn, the owner last, where each waits."""
    last = {slot.stage: slot for slot in slots}
    order = sorted(last, key=lambda stage: stage == owner_stage)
    for _, stage in zip(range(num_microbatches), itertools.cycle(order), strict=False):
        last[stage].count += 1


def _number(pipeline: Pipeline, slots: list[_Slot], due: range) -> list[StagePlan]:
    """Hand out the microbatches: what is computed first is due first."""
    shares: dict[tuple[int, str], list[int]] = {(slot.stage, slot.when): [] for slot in slots}
    numbers = {"now": iter(due), "after": itertools.count()}
    for when in ("after", "before", "waiting"):
        counts = {slot.stage: slot.count for slot in slots if slot.when == when}
        rounds = range(max(counts.values(), default=0))
        source = numbers["after" if when == "after" else "now"]
        for turn, stage in itertools.product(rounds, counts):
            if turn < counts[stage]:
                shares[stage, when].append(next(source))
    return [
        StagePlan(
            before=tuple(shares.get((stage, "before"), ())),
            waiting=tuple(shares.get((stage, "waiting"), ())),
            after=tuple(shares.get((stage, "after"), ())),
        )
        for stage in range(pipeline.num_stages)
    ]
