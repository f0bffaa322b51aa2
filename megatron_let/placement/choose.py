"""Select the placement with the shortest simulated step."""

from __future__ import annotations

from megatron_let.config.let_config import Placement
from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.plan import FIXED_PLACEMENTS, Plan, plan
from megatron_let.placement.simulate import AlignedLayer, Costs, Timeline, simulate

# Gain in step time, 0.1 %, below which the placement that needs less memory is preferred.
_WORTH = 1e-3


def steady_plan(
    placement: Placement, pipeline: Pipeline, costs: Costs, aligned: AlignedLayer, max_prefetch: int
) -> Plan:
    """Return the plan of a global batch whose predecessor has also computed states ahead."""
    cold = plan(placement, pipeline, costs, aligned, max_prefetch=max_prefetch)
    return plan(
        placement, pipeline, costs, aligned, max_prefetch=max_prefetch, num_ready=cold.num_ahead
    )


def steady_timeline(
    placement: Placement, pipeline: Pipeline, costs: Costs, aligned: AlignedLayer, max_prefetch: int
) -> Timeline:
    """Simulate one steady-state global batch under this placement."""
    stages = steady_plan(placement, pipeline, costs, aligned, max_prefetch).stages
    return simulate(pipeline, costs, aligned, stages)


def step_time_ratio(
    placement: Placement, pipeline: Pipeline, costs: Costs, aligned: AlignedLayer, max_prefetch: int
) -> float:
    """Return the simulated step time with the teacher over that without."""
    with_teacher = steady_timeline(placement, pipeline, costs, aligned, max_prefetch).duration
    return with_teacher / simulate(pipeline, costs, aligned).duration


def fastest(
    pipeline: Pipeline, costs: Costs, aligned: AlignedLayer, max_prefetch: int
) -> Placement:
    """Return the placement with the shortest step; of nearly equal ones, the least memory."""
    best = FIXED_PLACEMENTS[0]
    ratios = {
        name: step_time_ratio(name, pipeline, costs, aligned, max_prefetch)
        for name in FIXED_PLACEMENTS
    }
    for name in FIXED_PLACEMENTS:
        if ratios[name] < ratios[best] - _WORTH:
            best = name
    return best
