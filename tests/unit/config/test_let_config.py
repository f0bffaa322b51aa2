"""LETConfig: defaults, and values out of range."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_let.config.let_config import LETConfig, alignment_weight
from megatron_let.errors import LETError


def let_config(**values: Any) -> LETConfig:
    return LETConfig(**{"method": "let", "teacher": Path("/models/small"), **values})


def test_defaults_are_the_papers() -> None:
    config = LETConfig()
    assert (config.layer, config.weight, config.stop_step) == (3, 0.1, 1500)
    assert (config.teacher_layer, config.teacher_final_norm) == ("last", True)
    assert config.method == "none" and not config.enabled


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"method": "kd"}, ["--let-method", "'kd'", "none, let, rkd, salt"]),
        ({"loss": "mse"}, ["--let-loss", "'mse'", "cosine, logsum, cca"]),
        ({"projection": "mlp"}, ["--let-projection", "'mlp'", "interpolate, learned"]),
        ({"placement": "all"}, ["--let-placement", "'all'", "aligned-stage, spread"]),
        (
            {"loss": "cca", "projection": "learned"},
            ["--let-projection learned", "--let-loss cca", "cosine or logsum"],
        ),
        (
            {"loss": "logsum", "cross_tokenizer": True},
            ["--let-loss logsum", "--let-cross-tokenizer", "--let-loss cosine"],
        ),
        ({"teacher": None}, ["--let-method let", "--let-teacher"]),
        ({"layer": 0}, ["--let-layer is 0"]),
        ({"layer": -2}, ["--let-layer is -2"]),
        ({"weight": -0.1}, ["--let-weight is -0.1"]),
        ({"weight": float("nan")}, ["--let-weight is nan"]),
        ({"weight": float("inf")}, ["--let-weight is inf"]),
        ({"max_prefetch": 0}, ["--let-max-prefetch is 0"]),
        ({"stop_step": 0}, ["--let-stop-step is 0"]),
        ({"stop_step": -5}, ["--let-stop-step is -5"]),
        ({"teacher_layer": "0"}, ["--let-teacher-layer is '0'"]),
        ({"teacher_layer": "-1"}, ["--let-teacher-layer is '-1'"]),
        ({"teacher_layer": "first"}, ["--let-teacher-layer is 'first'"]),
        ({"teacher_layer": "2.5"}, ["--let-teacher-layer is '2.5'"]),
        ({"teacher_layer": ""}, ["--let-teacher-layer is ''"]),
        ({"method": "rkd", "teacher": None}, ["--let-method rkd", "--let-teacher"]),
        (
            {"method": "rkd", "projection": "learned"},
            ["--let-projection learned", "--let-method rkd", "--let-method let"],
        ),
        ({"method": "salt", "projection": "learned"}, ["--let-projection", "--let-method salt"]),
        ({"method": "rkd", "kd_weight": 1.5}, ["--let-kd-weight is 1.5"]),
        ({"method": "salt", "kd_weight": float("nan")}, ["--let-kd-weight is nan"]),
        ({"method": "rkd", "kd_temperature": 0.0}, ["--let-kd-temperature is 0.0"]),
        ({"method": "salt", "kd_top_k": -1}, ["--let-kd-top-k is -1"]),
        ({"method": "salt", "stop_step": 0}, ["--let-stop-step is 0"]),
    ],
)
def test_value_out_of_range_raises_error_naming_flag_and_value(
    values: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(LETError) as error:
        let_config(**values)
    message = str(error.value)
    assert all(part in message for part in named), message
    assert "\n" not in message and message.endswith("."), message


@pytest.mark.parametrize("layer", ["last", "middle", "1", "12"])
def test_teacher_layer_by_name_or_number_is_accepted(layer: str) -> None:
    assert let_config(teacher_layer=layer).teacher_layer == layer


def test_weight_0_is_accepted_and_not_enabled() -> None:
    assert let_config().enabled
    assert let_config(method="rkd", weight=0.0).enabled
    assert not let_config(method="salt", kd_weight=0.0).enabled
    assert not let_config(weight=0.0).enabled


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        let_config().weight = -1.0  # type: ignore[misc]


# The weight


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
