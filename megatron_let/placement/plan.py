"""Plan which stage runs the teacher on which microbatch, and when. Pure functions."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from megatron_let.config.let_config import PLACEMENTS, Placement
from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.program import AlignedLayer, StagePlan
from megatron_let.placement.rendezvous import plan_completes
from megatron_let.placement.simulate import Costs, Timeline, simulate

# What `auto` chooses from.
FIXED_PLACEMENTS = tuple(name for name in PLACEMENTS if name != "auto")

# Gain in step time, 0.1 %, below which the placement that needs less memory is preferred.
_WORTH = 1e-3
# Durations are sums of floats: rounding must not reject work that fits exactly.
_SLACK = 1e-9


@dataclass(frozen=True)
class Plan:
    """Teacher work in one global batch.

    Attributes:
        stages: share of each stage.
    """

    stages: tuple[StagePlan, ...]

    @property
    def num_ahead(self) -> int:
        """Return how many of the next global batch's first microbatches this one computes."""
        return sum(len(stage.after) for stage in self.stages)

    def sources(self) -> dict[int, int]:
        """Map each microbatch of this global batch to the stage that computes its state."""
        return {
            microbatch: index
            for index, stage in enumerate(self.stages)
            for microbatch in (*stage.before, *stage.waiting, *stage.at_forward)
        }

    def sources_ahead(self) -> dict[int, int]:
        """Map the first microbatches of the next global batch to the stages that compute them."""
        return {m: index for index, stage in enumerate(self.stages) for m in stage.after}


def samples_split(num_ranks: int, micro_batch_size: int) -> int:
    """Return how many ranks of a stage share the samples of a microbatch.

    The tensor- and context-parallel ranks of a stage see the same tokens. If their number does
    not divide the microbatch, groups of the greatest common divisor share it.
    """
    return math.gcd(num_ranks, micro_batch_size)


def num_microbatches_together(num_ranks: int, micro_batch_size: int) -> int:
    """Return how many microbatches occupy all ranks of a stage at once; see `samples_split`."""
    return num_ranks // samples_split(num_ranks, micro_batch_size)


def num_computed_at_forward(pipeline: Pipeline, aligned: AlignedLayer, num_together: int) -> int:
    """Return the most states held at a time that are computed in forwards of the aligned stage.

    A state is computed in its forward, or in that of one of the `num_together` - 1 microbatches
    before it, and held to its backward.
    """
    in_flight = pipeline.num_in_flight(*aligned)
    return min(in_flight + num_together - 1, pipeline.num_microbatches)


@functools.lru_cache(maxsize=32)
def plan(
    placement: Placement,
    pipeline: Pipeline,
    costs: Costs,
    aligned: AlignedLayer,
    *,
    max_prefetch: int,
    num_ready: int = 0,
    look_ahead: bool = True,
) -> Plan:
    """Assign every microbatch of a global batch to a stage and a time.

    Args:
        placement: `aligned-stage`: the aligned stage computes each microbatch before its forward;
            `spread`: evenly over the stages, before the schedule starts; `bubble`: in the idle
            times of the stages (the aligned stage last), and the rest before the schedule.
        costs: costs of one microbatch; only `bubble` depends on their ratios.
        aligned: stage and model chunk of layer k.
        max_prefetch: states that the aligned stage may hold before their backward, at least 1.
        num_ready: number of first microbatches whose states the previous batch computed.
        look_ahead: whether the next global batch is known and needs the teacher.

    Returns:
        A plan that covers the microbatches from `num_ready` on and, with `look_ahead`, the first
        `num_ahead` microbatches of the next global batch.
    """
    due = range(num_ready, pipeline.num_microbatches)
    if placement == "aligned-stage" or pipeline.num_stages == 1:
        stages = _aligned(pipeline, aligned, due, costs.num_together)
    elif placement == "spread":
        stages = _spread(pipeline, aligned, due)
    else:
        stages = _bubble(pipeline, costs, aligned, due, max_prefetch, look_ahead)
    stages = _within(stages, aligned, max_prefetch)
    # No plan is used that is not shown to complete under NCCL's rules.
    if not plan_completes(pipeline, aligned, stages):
        stages = _aligned(pipeline, aligned, due, costs.num_together)
    return Plan(tuple(stages))


def steady_timeline(
    placement: Placement, pipeline: Pipeline, costs: Costs, aligned: AlignedLayer, max_prefetch: int
) -> Timeline:
    """Simulate a global batch whose predecessor has also computed states ahead."""
    cold = plan(placement, pipeline, costs, aligned, max_prefetch=max_prefetch)
    steady = plan(
        placement, pipeline, costs, aligned, max_prefetch=max_prefetch, num_ready=cold.num_ahead
    )
    return simulate(pipeline, costs, aligned, steady.stages)


def step_time_ratio(
    placement: Placement, pipeline: Pipeline, costs: Costs, aligned: AlignedLayer, max_prefetch: int
) -> float:
    """Return the simulated step time with the teacher over that without."""
    with_teacher = steady_timeline(placement, pipeline, costs, aligned, max_prefetch).duration
    return with_teacher / simulate(pipeline, costs, aligned).duration


def fastest(seconds: Mapping[Placement, float]) -> Placement:
    """Return the placement with the shortest step; of nearly equal ones, the least memory."""
    limit = min(seconds.values()) * (1 + _WORTH)
    return next(name for name in FIXED_PLACEMENTS if seconds[name] <= limit)


def _aligned(
    pipeline: Pipeline, aligned: AlignedLayer, due: range, num_together: int
) -> list[StagePlan]:
    stages = [StagePlan()] * pipeline.num_stages
    # With one stage the first run is before the schedule and overlaps the parameter gather.
    before = tuple(due[:num_together]) if pipeline.num_stages == 1 else ()
    stages[aligned.stage] = StagePlan(before=before, at_forward=tuple(due[len(before) :]))
    return stages


def _aligned_last(pipeline: Pipeline, aligned: AlignedLayer) -> list[int]:
    others = [stage for stage in range(pipeline.num_stages) if stage != aligned.stage]
    return [*others, aligned.stage]


def _spread(pipeline: Pipeline, aligned: AlignedLayer, due: Iterable[int]) -> list[StagePlan]:
    order = itertools.cycle(_aligned_last(pipeline, aligned))
    shares: list[list[int]] = [[] for _ in range(pipeline.num_stages)]
    for microbatch, stage in zip(due, order, strict=False):
        shares[stage].append(microbatch)
    return [StagePlan(before=tuple(share)) for share in shares]


def _within(stages: list[StagePlan], aligned: AlignedLayer, max_prefetch: int) -> list[StagePlan]:
    """Move to their forward the microbatches whose states may not be held from the start.

    The aligned stage computes these: under NCCL, a state that another stage sends later would
    have to be received in the middle of the schedule.
    """
    late = sorted(m for s in stages for m in (*s.before, *s.waiting) if m >= max_prefetch)
    result = [
        replace(
            stage,
            before=tuple(m for m in stage.before if m < max_prefetch),
            waiting=tuple(m for m in stage.waiting if m < max_prefetch),
        )
        for stage in stages
    ]
    at_forward = (*result[aligned.stage].at_forward, *late)
    result[aligned.stage] = replace(result[aligned.stage], at_forward=at_forward)
    return result


@dataclass
class _Slot:
    """An idle time of a stage and the number of microbatches assigned to it."""

    stage: int
    when: Literal["before", "waiting", "after"]
    idle_seconds: float
    count: int = 0

    def has_room(self, costs: Costs) -> bool:
        """Return whether the last run of the teacher has ranks without work."""
        return self.count % costs.num_together > 0

    def add(self, costs: Costs) -> None:
        """Assign a microbatch."""
        if not self.has_room(costs):
            self.idle_seconds -= costs.teacher
        self.count += 1


def _bubble(
    pipeline: Pipeline,
    costs: Costs,
    aligned: AlignedLayer,
    due: range,
    max_prefetch: int,
    look_ahead: bool,
) -> list[StagePlan]:
    """Fill the idle times of the stages."""
    slots = _idle_slots(pipeline, costs, aligned)
    ahead = _fill_steady(pipeline, costs, aligned, slots, max_prefetch) if look_ahead else []
    now = [replace(slot) for slot in slots if slot.when != "after"]
    _fill(now, len(due), costs, aligned.stage)
    _fill_rest(now, len(due) - _total(now), costs, aligned.stage)
    return _number(pipeline, now + ahead, due)


def _idle_slots(pipeline: Pipeline, costs: Costs, aligned: AlignedLayer) -> list[_Slot]:
    baseline = simulate(pipeline, costs, aligned)
    slots = []
    for stage in range(pipeline.num_stages):
        idle = baseline.idle(stage)
        slots.append(_Slot(stage, "before", idle.start))
        # Another stage would have to send within the schedule (see rendezvous.py).
        if stage == aligned.stage:
            slots.append(_Slot(stage, "waiting", idle.waiting))
        slots.append(_Slot(stage, "after", idle.end))
    return slots


def _fill_steady(
    pipeline: Pipeline, costs: Costs, aligned: AlignedLayer, slots: list[_Slot], max_prefetch: int
) -> list[_Slot]:
    """Return the slots, with counts, of a global batch's share that runs in the previous batch."""
    steady = [replace(slot) for slot in slots]
    _fill(steady, pipeline.num_microbatches, costs, aligned.stage)
    ahead = [slot for slot in steady if slot.when == "after"]
    while _total(ahead) > max_prefetch:
        max(ahead, key=lambda slot: slot.count).count -= 1
    return ahead


def _total(slots: Iterable[_Slot]) -> int:
    return sum(slot.count for slot in slots)


def _fill(slots: list[_Slot], num_microbatches: int, costs: Costs, aligned_stage: int) -> None:
    """Assign microbatches to the longest slots while they fit, the aligned stage's last."""
    for on_aligned in (False, True):
        candidates = [slot for slot in slots if (slot.stage == aligned_stage) == on_aligned]
        while candidates and _total(slots) < num_microbatches:
            slot = max(candidates, key=lambda slot: (slot.has_room(costs), slot.idle_seconds))
            fits = slot.idle_seconds >= costs.teacher * (1 - _SLACK)
            if not (fits or slot.has_room(costs)):
                break
            slot.add(costs)


def _fill_rest(slots: list[_Slot], num_microbatches: int, costs: Costs, aligned_stage: int) -> None:
    """Assign the rest before the schedule, to the stage whose first pass it delays the least.

    A later slot of the aligned stage would delay the output that the next stage waits for.
    """
    before = [slot for slot in slots if slot.when == "before"]

    def order(slot: _Slot) -> tuple[bool, float, bool]:
        return slot.has_room(costs), slot.idle_seconds, slot.stage != aligned_stage

    for _ in range(num_microbatches):
        max(before, key=order).add(costs)


def _number(pipeline: Pipeline, slots: list[_Slot], due: range) -> list[StagePlan]:
    """Number the microbatches so that those computed first are due first."""
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
            num_forwards_to_wait=pipeline.num_forwards_to_wait(stage),
        )
        for stage in range(pipeline.num_stages)
    ]
