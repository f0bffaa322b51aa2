"""Plans: every microbatch is computed once, in time, and without a deadlock."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.config.let_config import Placement
from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.plan import (
    FIXED_PLACEMENTS,
    Plan,
    plan,
    samples_split,
    steady_timeline,
)
from megatron_let.placement.program import AlignedLayer, StagePlan
from megatron_let.placement.simulate import Costs, simulate

SIZES = [(2, 2, 1), (2, 4, 2), (3, 5, 1), (4, 4, 1), (4, 16, 1), (4, 8, 2), (4, 8, 3), (8, 16, 2)]


@st.composite
def requests(draw: st.DrawFn) -> tuple[Placement, Pipeline, Costs, AlignedLayer, int, int]:
    """Draw (placement, pipeline, costs, aligned layer, max_prefetch, num_ready)."""
    stages = draw(st.integers(1, 5))
    chunks = draw(st.integers(1, 3)) if stages > 1 else 1
    groups = draw(st.integers(1, 4))
    microbatches = groups * stages if chunks > 1 else draw(st.integers(1, 17))
    seconds = st.floats(0.1, 10)
    forward = tuple(draw(seconds) for _ in range(stages))
    backward = tuple(2 * f for f in forward)
    together = draw(st.integers(1, 5))
    costs = Costs(forward, backward, teacher=draw(st.floats(0, 10)), num_together=together)
    aligned = AlignedLayer(draw(st.integers(0, stages - 1)), draw(st.integers(0, chunks - 1)))
    limit = draw(st.integers(1, microbatches))
    pipeline = Pipeline(stages, microbatches, chunks, overlap_p2p=draw(st.booleans()))
    placement = draw(st.sampled_from(FIXED_PLACEMENTS))
    cold = plan(placement, pipeline, costs, aligned, max_prefetch=limit)
    return placement, pipeline, costs, aligned, limit, draw(st.sampled_from([0, cold.num_ahead]))


@settings(deadline=None, max_examples=150)
@given(requests())
def test_plan_computes_every_microbatch_once(
    request: tuple[Placement, Pipeline, Costs, AlignedLayer, int, int],
) -> None:
    placement, pipeline, costs, aligned, limit, num_ready = request
    made = plan(placement, pipeline, costs, aligned, max_prefetch=limit, num_ready=num_ready)
    now = [m for s in made.stages for m in (*s.before, *s.waiting, *s.at_forward)]
    assert sorted(now) == list(range(num_ready, pipeline.num_microbatches))
    ahead = [m for stage in made.stages for m in stage.after]
    assert sorted(ahead) == list(range(made.num_ahead)) and made.num_ahead <= limit
    assert all(m < limit for s in made.stages for m in (*s.before, *s.waiting))
    for index, stage in enumerate(made.stages):
        # Stages send in the order in which the aligned stage receives.
        assert list(stage.before + stage.waiting) == sorted(stage.before + stage.waiting)
        assert index == aligned.stage or not stage.at_forward


@settings(deadline=None, max_examples=150)
@given(requests())
def test_plan_does_not_deadlock(
    request: tuple[Placement, Pipeline, Costs, AlignedLayer, int, int],
) -> None:
    placement, pipeline, costs, aligned, limit, num_ready = request
    made = plan(placement, pipeline, costs, aligned, max_prefetch=limit, num_ready=num_ready)
    simulate(pipeline, costs, aligned, made.stages)


@pytest.mark.parametrize(("stages", "microbatches", "chunks"), SIZES)
def test_plan_does_not_deadlock_for_any_position_of_layer_k(
    stages: int, microbatches: int, chunks: int
) -> None:
    pipeline = Pipeline(stages, microbatches, chunks)
    for stage, chunk, teacher in itertools.product(range(stages), range(chunks), (0.1, 1, 5)):
        costs, aligned = Costs.uniform(stages, 1, 2, teacher), AlignedLayer(stage, chunk)
        for placement in FIXED_PLACEMENTS:
            steady_timeline(placement, pipeline, costs, aligned, microbatches)


@pytest.mark.parametrize(("stages", "microbatches", "chunks"), SIZES)
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("teacher", [0.2, 0.5, 1.0])
def test_step_time_bubble_at_most_spread_at_most_aligned_stage(
    stages: int, microbatches: int, chunks: int, teacher: float, together: int
) -> None:
    pipeline, costs = Pipeline(stages, microbatches, chunks), Costs.uniform(stages, 1, 2, teacher)
    costs = replace(costs, num_together=together)
    aligned, spread, bubble = (
        steady_timeline(placement, pipeline, costs, AlignedLayer(0), microbatches).duration
        for placement in FIXED_PLACEMENTS
    )
    assert bubble <= spread + 1e-9 and spread <= aligned + 1e-9


def shares(made: Plan) -> list[tuple[tuple[int, ...], ...]]:
    return [(s.before, s.waiting, s.at_forward, s.after) for s in made.stages]


@pytest.mark.parametrize("num_together", [1, 2])
def test_plan_one_stage_computes_only_first_run_before_schedule(num_together: int) -> None:
    costs = replace(Costs.uniform(1, 1, 2, 1), num_together=num_together)
    for placement in FIXED_PLACEMENTS:
        made = plan(placement, Pipeline(1, 3), costs, AlignedLayer(0), max_prefetch=3)
        whole = (0, 1, 2)
        assert shares(made) == [(whole[:num_together], (), whole[num_together:], ())]


@pytest.mark.parametrize(
    ("placement", "num_ready", "expected"),
    [
        ("aligned-stage", 0, [((), (), (0, 1, 2, 3, 4, 5), ()), ((), (), (), ())]),
        ("spread", 0, [((1, 3, 5), (), (), ()), ((0, 2, 4), (), (), ())]),
        # The second stage is idle for 1 at the start and 2 at the end; the first for 2 in between.
        ("bubble", 2, [((), (4, 5), (), ()), ((2, 3), (), (), (0, 1))]),
        ("bubble", 0, [((0,), (4, 5), (), ()), ((1, 2, 3), (), (), (0, 1))]),
    ],
)
def test_plan_two_stages_six_microbatches_equals_plan_by_hand(
    placement: Placement, num_ready: int, expected: list[tuple[tuple[int, ...], ...]]
) -> None:
    made = plan(
        placement,
        Pipeline(2, 6),
        Costs.uniform(2, 1, 2, 1),
        AlignedLayer(0),
        max_prefetch=6,
        num_ready=num_ready,
    )
    assert shares(made) == expected


@pytest.mark.parametrize(
    ("num_ready", "expected"),
    [
        # Runs of up to two: one at the start of the second stage, two in the first one's wait.
        (0, [((), (2, 3, 4, 5), (), ()), ((0, 1), (), (), (0, 1, 2, 3))]),
        (4, [((), (), (), ()), ((4, 5), (), (), (0, 1, 2, 3))]),
    ],
)
def test_plan_fills_runs_of_several_microbatches(
    num_ready: int, expected: list[tuple[tuple[int, ...], ...]]
) -> None:
    costs = replace(Costs.uniform(2, 1, 2, 1), num_together=2)
    options = {"max_prefetch": 6, "num_ready": num_ready}
    made = plan("bubble", Pipeline(2, 6), costs, AlignedLayer(0), **options)  # type: ignore[arg-type]
    assert shares(made) == expected


def test_plan_above_max_prefetch_moves_work_to_forward() -> None:
    made = plan(
        "spread", Pipeline(2, 6), Costs.uniform(2, 1, 2, 1), AlignedLayer(0), max_prefetch=2
    )
    assert made.stages[0] == StagePlan(before=(1,), at_forward=(2, 3, 4, 5))
    assert made.stages[1].before == (0,)


def test_plan_without_look_ahead_computes_nothing_ahead() -> None:
    pipeline, costs = Pipeline(4, 16), Costs.uniform(4, 1, 2, 1)
    options = {"max_prefetch": 16, "look_ahead": False}
    assert plan("bubble", pipeline, costs, AlignedLayer(0), **options).num_ahead == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranks", "b", "expected"), [(1, 4, 1), (4, 4, 4), (2, 3, 1), (8, 4, 4), (8, 2, 2)]
)
def test_samples_split_is_greatest_common_divisor(ranks: int, b: int, expected: int) -> None:
    assert samples_split(ranks, b) == expected
