"""Costs that the scheduler measures."""

from __future__ import annotations

import pytest
import torch

from megatron_let.placement import scheduler
from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.plan import FIXED_PLACEMENTS
from megatron_let.placement.program import AlignedLayer
from megatron_let.placement.scheduler import PassTimes, PlacementScheduler
from megatron_let.placement.simulate import Costs


@pytest.mark.parametrize(("num_together", "expected"), [(1, 2.0), (2, 3.0), (8, 6.0)])
def test_teacher_time_is_that_of_one_run(
    num_together: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler.time, "perf_counter", iter([10.0, 16.0]).__next__)
    times = PassTimes(torch.device("cpu"), num_together)
    times.time_teacher(lambda: None, num_microbatches=3)
    assert times.teacher == expected


def test_first_run_fills_the_ranks_before_any_cost_is_measured() -> None:
    made = PlacementScheduler("auto", None, Pipeline(1, 5), AlignedLayer(0), 2, print)
    (stage,) = made.plan(5, num_ready=0, look_ahead=True).stages
    assert stage.before == (0, 1) and stage.at_forward == (2, 3, 4)


def test_placement_is_simulated_once_per_number_of_microbatches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline, simulated = Pipeline(4, 8), []
    made = PlacementScheduler("auto", None, pipeline, AlignedLayer(0), 1, print)

    def counted(*given: object) -> object:
        simulated.append(given)
        return original(*given)

    original = scheduler.steady_timeline
    monkeypatch.setattr(scheduler, "steady_timeline", counted)
    timer = PassTimes(torch.device("cpu"), 1)
    monkeypatch.setattr(timer, "costs", lambda *_: Costs.uniform(4, 1, 2, 0.1))
    made.end_step(timer, 0, 8)
    simulated.clear()
    for _ in range(3):
        made.plan(8, num_ready=0, look_ahead=True)
    assert not simulated
    for _ in range(3):
        made.plan(12, num_ready=0, look_ahead=True)
    assert len(simulated) == len(FIXED_PLACEMENTS)
