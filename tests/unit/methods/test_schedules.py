"""The weight falls on a straight line from lambda_0 to 0 at S_stop (equation 5)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_let.methods.schedules import alignment_weight

weights = st.floats(min_value=0, max_value=1e6, allow_subnormal=False)
stop_steps = st.integers(min_value=1, max_value=10**7)
steps = st.integers(min_value=0, max_value=2 * 10**7)


@pytest.mark.parametrize(
    ("step", "initial", "stop", "expected"),
    [
        (0, 0.1, 1500, 0.1),
        (750, 0.1, 1500, 0.05),
        (1499, 0.1, 1500, 0.1 / 1500),
        (1500, 0.1, 1500, 0.0),
        (1501, 0.1, 1500, 0.0),
        (10**9, 0.1, 1500, 0.0),
        (0, 0.0, 1500, 0.0),
        (0, 3.0, 1, 3.0),
        (1, 3.0, 1, 0.0),
        (1, 3.0, 3, 2.0),
    ],
)
def test_paper_schedule(step: int, initial: float, stop: int, expected: float) -> None:
    assert alignment_weight(step, initial, stop) == pytest.approx(expected, rel=1e-12, abs=0)


@given(steps, weights, stop_steps)
def test_weight_is_within_0_and_initial(step: int, initial: float, stop: int) -> None:
    assert 0 <= alignment_weight(step, initial, stop) <= initial * (1 + 1e-12)


@given(weights, stop_steps)
def test_weight_starts_at_initial_and_is_exactly_0_from_stop_on(initial: float, stop: int) -> None:
    assert alignment_weight(0, initial, stop) == pytest.approx(initial, rel=1e-12)
    assert alignment_weight(stop, initial, stop) == 0
    assert alignment_weight(stop + 1, initial, stop) == 0


@given(steps, st.floats(min_value=1e-3, max_value=1e3), stop_steps)
def test_weight_is_0_only_from_stop_on(step: int, initial: float, stop: int) -> None:
    assert (alignment_weight(step, initial, stop) == 0) == (step >= stop)


@given(weights, stop_steps, st.data())
def test_weight_falls_by_the_same_amount_each_step(
    initial: float, stop: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(min_value=0, max_value=stop - 1))
    fall = alignment_weight(step, initial, stop) - alignment_weight(step + 1, initial, stop)
    assert fall == pytest.approx(initial / stop, rel=1e-6, abs=1e-12 * initial)
