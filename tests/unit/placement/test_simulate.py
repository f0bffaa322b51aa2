"""The simulation, compared with closed forms and with figures of another simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.plan import fastest, step_time_ratio
from megatron_let.placement.program import AlignedLayer, StagePlan
from megatron_let.placement.simulate import Costs, DeadlockError, simulate

FIRST = AlignedLayer(0)
# Teacher forward over student training FLOPs: SmolLM2-1.7B and the 7B student, 1,280 tokens.
TEACHER_SHARE = 0.0825


@pytest.mark.parametrize(("p", "n"), [(1, 3), (2, 4), (4, 4), (4, 9), (8, 32)])
def test_duration_1f1b_equals_closed_form(p: int, n: int) -> None:
    timeline = simulate(Pipeline(p, n), Costs.uniform(p, 1, 2, 0), FIRST)
    assert timeline.duration == pytest.approx((n + p - 1) * 3)


@pytest.mark.parametrize(("p", "n", "v"), [(2, 4, 2), (4, 8, 2), (4, 16, 4)])
def test_duration_interleaved_equals_closed_form(p: int, n: int, v: int) -> None:
    timeline = simulate(Pipeline(p, n, v), Costs.uniform(p, 1, 2, 0), FIRST)
    assert timeline.duration == pytest.approx(3 * n + (p - 1) * 3 / v)


@pytest.mark.parametrize("stage", range(4))
def test_idle_times_1f1b_equal_closed_form(stage: int) -> None:
    idle = simulate(Pipeline(4, 16), Costs.uniform(4, 1, 2, 0), FIRST).idle(stage)
    assert idle == pytest.approx((stage, 2 * (3 - stage), 2 * stage))


@pytest.mark.parametrize(
    ("p", "n", "aligned", "spread", "bubble"),
    [
        (2, 16, 1.146, 1.078, 1.029),
        (2, 64, 1.160, 1.081, 1.069),
        (4, 16, 1.226, 1.070, 1.000),
        (4, 64, 1.301, 1.079, 1.049),
        (8, 32, 1.423, 1.068, 1.000),
        (8, 64, 1.530, 1.074, 1.023),
    ],
)
def test_step_time_ratio_7b_equals_documented_table(
    p: int, n: int, aligned: float, spread: float, bubble: float
) -> None:
    pipeline, costs = Pipeline(p, n), Costs.uniform(p, 1, 2, TEACHER_SHARE * 3 * p)
    expected = {"aligned-stage": aligned, "spread": spread, "bubble": bubble}
    for placement, ratio in expected.items():
        assert step_time_ratio(placement, pipeline, costs, FIRST, n) == pytest.approx(
            ratio, abs=1e-3
        )


def test_fastest_prefers_less_memory_within_a_thousandth() -> None:
    assert fastest({"aligned-stage": 1.3, "spread": 1.1, "bubble": 1.05}) == "bubble"
    assert fastest({"aligned-stage": 1.3, "spread": 1.0505, "bubble": 1.05}) == "spread"


def test_duration_follows_slowest_stage() -> None:
    costs = Costs(forward=(1, 3), backward=(2, 6), teacher=0)
    assert simulate(Pipeline(2, 8), costs, FIRST).duration == pytest.approx(1 + 8 * 9 + 2)


def test_stage_waits_until_its_output_is_awaited() -> None:
    # The second stage asks for the first output at 5, and the first stage sends it at 1.
    late = [StagePlan(), StagePlan(before=(0,))]
    timeline = simulate(Pipeline(2, 4), Costs.uniform(2, 1, 2, 5), FIRST, late)
    starts = [span.start for span in timeline.spans[0] if span.kind == "forward"]
    assert starts[:2] == [0, 5]


@pytest.mark.parametrize(("num_together", "num_runs"), [(1, 6), (2, 3), (4, 2), (8, 1)])
@pytest.mark.parametrize("when", ["before", "at_forward"])
def test_teacher_runs_on_several_microbatches(when: str, num_together: int, num_runs: int) -> None:
    costs = replace(Costs.uniform(2, 1, 2, 5), num_together=num_together)
    plans = [StagePlan(**{when: tuple(range(6))}), StagePlan()]
    spans = simulate(Pipeline(2, 6), costs, FIRST, plans).spans[0]
    runs = [span for span in spans if span.kind == "teacher"]
    assert [span.microbatch for span in runs] == list(range(0, 6, num_together))
    assert len(runs) == num_runs and all(span.end - span.start == 5 for span in runs)


def test_duration_includes_transfers() -> None:
    costs = Costs((1, 1), (2, 2), teacher=0, transfer=0.25)
    assert simulate(Pipeline(2, 1), costs, FIRST).duration == pytest.approx(6.5)


def test_state_of_another_stage_arrives_after_its_transfer() -> None:
    costs = replace(Costs.uniform(2, 1, 2, 10), state_transfer=0.5)
    on_other = [StagePlan(), StagePlan(before=(0,))]
    on_aligned = [StagePlan(before=(0,)), StagePlan()]
    # Teacher 10, last stage 3, transfer in the meantime, first stage 2.
    assert simulate(Pipeline(2, 1), costs, FIRST, on_other).duration == 15
    late = replace(costs, state_transfer=5)
    assert simulate(Pipeline(2, 1), late, FIRST, on_other).duration == 17
    # Its own state needs no transfer: teacher 10, both stages' forward and backward 6.
    assert simulate(Pipeline(2, 1), late, FIRST, on_aligned).duration == 16


@pytest.mark.parametrize(("ahead", "duration"), [((), 7), ((0, 1), 8)])
def test_reduction_follows_the_last_backward_and_overlaps_the_teacher(
    ahead: tuple[int, ...], duration: float
) -> None:
    costs = replace(Costs.uniform(2, 1, 2, 1), reduce=1)
    plans = [StagePlan(after=ahead), StagePlan()]
    assert simulate(Pipeline(2, 1), costs, FIRST, plans).duration == duration


def test_backward_of_layer_k_waits_for_its_state() -> None:
    plans = [StagePlan(), StagePlan(after=(0,)), StagePlan()]
    on_last = [StagePlan(), StagePlan(), StagePlan(before=(0,))]
    pipeline, costs = Pipeline(3, 1), Costs.uniform(3, 1, 2, 100)
    first = simulate(pipeline, costs, FIRST, on_last).spans[0]
    assert [span.kind for span in first] == ["forward", "backward"]
    # Teacher 100, last stage 3, second stage 2.
    assert first[-1].start == 105
    ahead = simulate(pipeline, costs, FIRST, plans)
    assert ahead.spans[1][-1].microbatch == 1 and ahead.duration == 107


def test_deadlocked_stages_raise() -> None:
    # Stage 0 would compute the state of microbatch 0 after passes that need its backward.
    late = StagePlan(waiting=(0,), num_forwards_to_wait=4)
    with pytest.raises(DeadlockError, match="blocked at"):
        simulate(Pipeline(2, 4), Costs.uniform(2, 1, 2, 1), AlignedLayer(1), [late, StagePlan()])
