"""Who computes which microbatch, and when."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.placement.choose import steady_timeline
from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.plan import PLACEMENTS, Placement, Plan, plan, samples_split
from megatron_let.placement.simulate import Costs, Owner, StagePlan, simulate

SIZES = [(2, 2, 1), (2, 4, 2), (3, 5, 1), (4, 4, 1), (4, 16, 1), (4, 8, 2), (4, 8, 3), (8, 16, 2)]


@st.composite
def requests(draw: st.DrawFn) -> tuple[Placement, Pipeline, Costs, Owner, int, int]:
    """(placement, pipeline, costs, owner, max_prefetch, num_ready)."""
    stages = draw(st.integers(1, 5))
    chunks = draw(st.integers(1, 3)) if stages > 1 else 1
    groups = draw(st.integers(1, 4))
    microbatches = groups * stages if chunks > 1 else draw(st.integers(1, 17))
    seconds = st.floats(0.1, 10)
    forward = tuple(draw(seconds) for _ in range(stages))
    costs = Costs(forward, tuple(2 * f for f in forward), teacher=draw(st.floats(0, 10)))
    owner = Owner(draw(st.integers(0, stages - 1)), draw(st.integers(0, chunks - 1)))
    limit = draw(st.integers(1, microbatches))
    pipeline = Pipeline(stages, microbatches, chunks, overlap_p2p=draw(st.booleans()))
    placement = draw(st.sampled_from(PLACEMENTS))
    cold = plan(placement, pipeline, costs, owner, max_prefetch=limit)
    return placement, pipeline, costs, owner, limit, draw(st.sampled_from([0, cold.num_ahead]))


@settings(deadline=None, max_examples=150)
@given(requests())
def test_every_microbatch_is_computed_once(
    request: tuple[Placement, Pipeline, Costs, Owner, int, int],
) -> None:
    placement, pipeline, costs, owner, limit, num_ready = request
    made = plan(placement, pipeline, costs, owner, max_prefetch=limit, num_ready=num_ready)
    now = [m for s in made.stages for m in (*s.before, *s.waiting, *s.at_forward)]
    assert sorted(now) == list(range(num_ready, pipeline.num_microbatches))
    ahead = [m for stage in made.stages for m in stage.after]
    assert sorted(ahead) == list(range(made.num_ahead)) and made.num_ahead <= limit
    early = (*made.stages[owner.stage].before, *made.stages[owner.stage].waiting)
    assert all(m < limit for m in early)
    for index, stage in enumerate(made.stages):
        # A stage sends in the order in which the owner, by due date, receives.
        assert list(stage.before + stage.waiting) == sorted(stage.before + stage.waiting)
        assert index == owner.stage or not stage.at_forward


@settings(deadline=None, max_examples=150)
@given(requests())
def test_no_plan_lets_stages_wait_for_each_other(
    request: tuple[Placement, Pipeline, Costs, Owner, int, int],
) -> None:
    placement, pipeline, costs, owner, limit, num_ready = request
    made = plan(placement, pipeline, costs, owner, max_prefetch=limit, num_ready=num_ready)
    simulate(pipeline, costs, owner, made.stages)


@pytest.mark.parametrize(("stages", "microbatches", "chunks"), SIZES)
def test_no_plan_deadlocks_wherever_layer_k_is(stages: int, microbatches: int, chunks: int) -> None:
    pipeline = Pipeline(stages, microbatches, chunks)
    for stage, chunk, teacher in itertools.product(range(stages), range(chunks), (0.1, 1, 5)):
        costs, owner = Costs.uniform(stages, 1, 2, teacher), Owner(stage, chunk)
        for placement in PLACEMENTS:
            steady_timeline(placement, pipeline, costs, owner, microbatches)


@pytest.mark.parametrize(("stages", "microbatches", "chunks"), SIZES)
@pytest.mark.parametrize("teacher", [0.2, 0.5, 1.0])
def test_bubbles_cost_no_more_than_spreading_which_costs_no_more_than_the_owner_alone(
    stages: int, microbatches: int, chunks: int, teacher: float
) -> None:
    pipeline, costs = Pipeline(stages, microbatches, chunks), Costs.uniform(stages, 1, 2, teacher)
    aligned, spread, bubble = (
        steady_timeline(placement, pipeline, costs, Owner(0), microbatches).duration
        for placement in PLACEMENTS
    )
    assert bubble <= spread + 1e-9 and spread <= aligned + 1e-9


def shares(made: Plan) -> list[tuple[tuple[int, ...], ...]]:
    return [(s.before, s.waiting, s.at_forward, s.after) for s in made.stages]


def test_one_stage_computes_its_first_microbatch_before_the_schedule_and_the_others_in_turn() -> (
    None
):
    for placement in PLACEMENTS:
        made = plan(placement, Pipeline(1, 3), Costs.uniform(1, 1, 2, 1), Owner(0), max_prefetch=3)
        assert shares(made) == [((0,), (), (1, 2), ())]


@pytest.mark.parametrize(
    ("placement", "num_ready", "expected"),
    [
        ("aligned-stage", 0, [((), (), (0, 1, 2, 3, 4, 5), ()), ((), (), (), ())]),
        ("spread", 0, [((1, 3, 5), (), (), ()), ((0, 2, 4), (), (), ())]),
        # The second stage waits 1 at the start and 2 at the end; the first 2 in between.
        ("bubble", 2, [((), (3, 5), (), ()), ((2,), (4,), (), (0, 1))]),
        ("bubble", 0, [((), (1, 3, 5), (), ()), ((0,), (2, 4), (), (0, 1))]),
    ],
)
def test_two_stages_with_six_microbatches(
    placement: Placement, num_ready: int, expected: list[tuple[tuple[int, ...], ...]]
) -> None:
    made = plan(
        placement,
        Pipeline(2, 6),
        Costs.uniform(2, 1, 2, 1),
        Owner(0),
        max_prefetch=6,
        num_ready=num_ready,
    )
    assert shares(made) == expected


def test_the_owner_leaves_to_the_forward_what_it_may_not_hold() -> None:
    made = plan("spread", Pipeline(2, 6), Costs.uniform(2, 1, 2, 1), Owner(0), max_prefetch=2)
    assert made.stages[0] == StagePlan(before=(1,), at_forward=(3, 5), num_forwards_to_wait=2)
    assert made.stages[1].before == (0, 2, 4)


def test_nothing_is_computed_ahead_of_an_unknown_batch() -> None:
    pipeline, costs = Pipeline(4, 16), Costs.uniform(4, 1, 2, 1)
    options = {"max_prefetch": 16, "look_ahead": False}
    assert plan("bubble", pipeline, costs, Owner(0), **options).num_ahead == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tp", "cp", "b", "expected"),
    [(1, 1, 4, 1), (2, 2, 4, 4), (2, 1, 3, 1), (4, 2, 4, 4), (8, 1, 2, 2)],
)
def test_samples_are_shared_among_as_many_ranks_as_divide_them(
    tp: int, cp: int, b: int, expected: int
) -> None:
    assert samples_split(tp, cp, b) == expected
