"""Which placement a simulation finds the fastest."""

from __future__ import annotations

from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.plan import PLACEMENTS, Placement, Plan, plan
from megatron_let.placement.simulate import Costs, Owner, Timeline, simulate

# A faster placement must be worth the memory that it takes: 0.1 % of a step.
_WORTH = 1e-3


def steady_plan(
    placement: Placement, pipeline: Pipeline, costs: Costs, owner: Owner, max_prefetch: int
) -> Plan:
    """The plan of a global batch whose batch before has looked ahead too."""
    cold = plan(placement, pipeline, costs, owner, max_prefetch=max_prefetch)
    return plan(
        placement, pipeline, costs, owner, max_prefetch=max_prefetch, num_ready=cold.num_ahead
    )


def steady_timeline(
    placement: Placement, pipeline: Pipeline, costs: Costs, owner: Owner, max_prefetch: int
) -> Timeline:
    """One global batch of many under this placement."""
    stages = steady_plan(placement, pipeline, costs, owner, max_prefetch).stages
    return simulate(pipeline, costs, owner, stages)


def step_time_ratio(
    placement: Placement, pipeline: Pipeline, costs: Costs, owner: Owner, max_prefetch: int
) -> float:
    """Simulated time of a global batch with the teacher over one without."""
    with_teacher = steady_timeline(placement, pipeline, costs, owner, max_prefetch).duration
    return with_teacher / simulate(pipeline, costs, owner).duration


def fastest(pipeline: Pipeline, costs: Costs, owner: Owner, max_prefetch: int) -> Placement:
    """The placement with the shortest step; of nearly equal ones that with the least memory."""
    best = PLACEMENTS[0]
    ratios = {
        name: step_time_ratio(name, pipeline, costs, owner, max_prefetch) for name in PLACEMENTS
    }
    for name in PLACEMENTS:
        if ratios[name] < ratios[best] - _WORTH:
            best = name
    return best
