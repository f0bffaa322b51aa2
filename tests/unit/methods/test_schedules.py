"""Weights of the teacher's loss: lambda of LET (equation 5), w of RKD and SALT."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_let.config.let_config import LETConfig
from megatron_let.methods.schedules import alignment_weight, distillation_weight

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
def test_alignment_weight_equals_equation_5(
    step: int, initial: float, stop: int, expected: float
) -> None:
    assert alignment_weight(step, initial, stop) == pytest.approx(expected, rel=1e-12, abs=0)


@given(steps, weights, stop_steps)
def test_alignment_weight_is_between_0_and_initial(step: int, initial: float, stop: int) -> None:
    assert 0 <= alignment_weight(step, initial, stop) <= initial * (1 + 1e-12)


@given(weights, stop_steps)
def test_alignment_weight_is_initial_at_0_and_0_from_stop_on(initial: float, stop: int) -> None:
    assert alignment_weight(0, initial, stop) == pytest.approx(initial, rel=1e-12)
    assert alignment_weight(stop, initial, stop) == 0
    assert alignment_weight(stop + 1, initial, stop) == 0


@given(steps, st.floats(min_value=1e-3, max_value=1e3), stop_steps)
def test_alignment_weight_is_positive_before_stop(step: int, initial: float, stop: int) -> None:
    assert (alignment_weight(step, initial, stop) == 0) == (step >= stop)


@given(weights, stop_steps, st.data())
def test_alignment_weight_decreases_linearly(
    initial: float, stop: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(min_value=0, max_value=stop - 1))
    fall = alignment_weight(step, initial, stop) - alignment_weight(step + 1, initial, stop)
    assert fall == pytest.approx(initial / stop, rel=1e-6, abs=1e-12 * initial)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"method": "rkd"}, [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        ({"method": "salt"}, [0.5, 0.5, 0.5, 0.5, 0.0, 0.0]),
    ],
)
def test_distillation_weight_is_constant_until_salt_stops(
    values: dict[str, object], expected: list[float]
) -> None:
    config = LETConfig(teacher=Path("/t"), stop_step=4, **values)  # type: ignore[arg-type]
    assert [distillation_weight(step, config) for step in range(6)] == pytest.approx(expected)
