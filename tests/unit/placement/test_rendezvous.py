"""Plans complete under NCCL's rules, in every order in which ranks may have to wait."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.plan import FIXED_PLACEMENTS, plan
from megatron_let.placement.program import AlignedLayer, StagePlan
from megatron_let.placement.rendezvous import STRICTEST, Rules, plan_completes
from megatron_let.placement.simulate import Costs, simulate

pytestmark = pytest.mark.medium

GLOO = Rules(device_sync=False, one_queue=False)


def assert_plans_complete(
    pipeline: Pipeline, costs: Costs, aligned: AlignedLayer, limit: int
) -> None:
    """Check the first batch and a steady one, under every placement."""
    for placement in FIXED_PLACEMENTS:
        cold = plan(placement, pipeline, costs, aligned, max_prefetch=limit)
        steady = plan(
            placement, pipeline, costs, aligned, max_prefetch=limit, num_ready=cold.num_ahead
        )
        # Completion under the strictest rules implies completion under the others.
        assert plan_completes(pipeline, aligned, cold.stages, STRICTEST), placement
        assert plan_completes(pipeline, aligned, steady.stages, STRICTEST), placement


@pytest.mark.parametrize(
    ("stages", "chunks"), [(2, 1), (3, 1), (4, 1), (5, 1), (2, 2), (3, 2), (4, 2), (2, 3)]
)
def test_every_plan_of_small_pipelines_completes(stages: int, chunks: int) -> None:
    counts = range(1, 11) if chunks == 1 else range(stages, 3 * stages + 1, stages)
    for microbatches, teacher in itertools.product(counts, (0.1, 2)):
        pipeline = Pipeline(stages, microbatches, chunks)
        costs = Costs.uniform(stages, 1, 2, teacher)
        for stage, chunk in itertools.product(range(stages), range(chunks)):
            for limit in {1, 2, microbatches}:
                assert_plans_complete(pipeline, costs, AlignedLayer(stage, chunk), limit)


@st.composite
def large_pipelines(draw: st.DrawFn) -> tuple[Pipeline, Costs, AlignedLayer, int]:
    stages, chunks = draw(st.integers(2, 16)), draw(st.sampled_from([1, 1, 2, 4]))
    microbatches = draw(st.integers(1, 128))
    if chunks > 1:
        microbatches = stages * draw(st.integers(1, 128 // stages))
    forward = tuple(draw(st.floats(0.5, 2)) for _ in range(stages))
    costs = Costs(forward, tuple(2 * f for f in forward), teacher=draw(st.floats(0, 8)))
    aligned = AlignedLayer(draw(st.integers(0, stages - 1)), draw(st.integers(0, chunks - 1)))
    pipeline = Pipeline(stages, microbatches, chunks, overlap_p2p=draw(st.booleans()))
    return pipeline, costs, aligned, draw(st.integers(1, microbatches))


@settings(max_examples=25)
@given(large_pipelines())
def test_plans_of_large_pipelines_complete(
    request: tuple[Pipeline, Costs, AlignedLayer, int],
) -> None:
    assert_plans_complete(*request)


@pytest.mark.parametrize(("stages", "microbatches"), [(3, 16), (4, 16), (4, 64), (8, 32)])
def test_states_sent_within_schedule_complete_only_under_gloo(
    stages: int, microbatches: int
) -> None:
    """A stage that waits for its first gradient would have time, but must not send then."""
    pipeline, aligned = Pipeline(stages, microbatches), AlignedLayer(0)
    late = microbatches - 1
    shares = [StagePlan(before=tuple(range(late)))] + [StagePlan()] * (stages - 1)
    shares[1] = StagePlan(waiting=(late,), num_forwards_to_wait=pipeline.num_forwards_to_wait(1))
    simulate(pipeline, Costs.uniform(stages, 1, 2, 1), aligned, shares)
    assert plan_completes(pipeline, aligned, shares, GLOO)
    assert not plan_completes(pipeline, aligned, shares, Rules(device_sync=True, one_queue=False))


def test_two_queued_messages_of_one_pair_block_a_single_queue() -> None:
    pipeline, aligned = Pipeline(2, 4), AlignedLayer(0)
    waiting = StagePlan(waiting=(2, 3), num_forwards_to_wait=pipeline.num_forwards_to_wait(1))
    shares = [StagePlan(before=(0, 1)), waiting]
    assert plan_completes(pipeline, aligned, shares, GLOO)
    assert not plan_completes(pipeline, aligned, shares, Rules(device_sync=False, one_queue=True))


def test_state_computed_after_its_backward_never_completes() -> None:
    late = StagePlan(waiting=(0,), num_forwards_to_wait=4)
    assert not plan_completes(Pipeline(2, 4), AlignedLayer(1), [StagePlan(), late], GLOO)


@pytest.mark.parametrize("chunks", [1, 2])
def test_schedule_without_teacher_completes(chunks: int) -> None:
    for stages, groups in itertools.product((2, 4, 8), (1, 2, 5)):
        pipeline = Pipeline(stages, groups * stages, chunks)
        assert plan_completes(pipeline, AlignedLayer(0), [StagePlan()] * stages, STRICTEST)
