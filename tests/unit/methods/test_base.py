"""The registry of methods, and which global batches reach a method."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_let.config.let_config import METHODS as FLAG_VALUES
from megatron_let.methods import METHODS, TeacherMethod
from megatron_let.methods.base import find_layer


def test_registry_has_every_value_of_the_flag() -> None:
    assert {"none", *METHODS} == set(FLAG_VALUES)


class Recording(TeacherMethod):
    """Weight 1 in step 0, then 0."""

    def __init__(self, run: Any) -> None:
        super().__init__(run)
        self.num_released = 0

    def weight(self, step: int) -> float:
        return float(step == 0)

    def describe(self) -> str:
        return "recording"

    def run_with_teacher(self, forward_backward: Any, weight: float, kwargs: dict[str, Any]) -> Any:
        return "with teacher"

    def release(self) -> bool:
        self.num_released += 1
        return self.num_released == 1


class Run:
    """The part of a `TrainingRun` that the base class uses."""

    config = None

    def __init__(self, step: int) -> None:
        self.step = step
        self.lines: list[str] = []
        self.report = self.lines.append

    def current_step(self) -> int:
        return self.step


@pytest.mark.parametrize(
    ("step", "forward_only", "expected"),
    [(0, False, "with teacher"), (0, True, "stock"), (1, False, "stock")],
)
def test_run_uses_teacher_in_training_batches_with_weight(
    step: int, forward_only: bool, expected: str
) -> None:
    method = Recording(Run(step))
    getter = method.wrap_getter(lambda: lambda **kwargs: "stock")
    assert getter()(forward_only=forward_only) == expected


def test_run_without_weight_releases_and_reports_once() -> None:
    run = Run(1)
    method = Recording(run)
    for _ in range(2):
        method.run(lambda **kwargs: "stock", forward_only=False)
    assert len(run.lines) == 1 and "step 2" in run.lines[0]


def chunk(numbers: range, **pattern: str) -> Any:
    """Return a model chunk whose decoder has modules of these numbers."""
    layers = [SimpleNamespace(layer_number=number) for number in numbers]
    return SimpleNamespace(decoder=SimpleNamespace(layers=layers), **pattern)


def test_layer_of_a_gpt_model_is_found_by_its_number() -> None:
    model = [chunk(range(1, 3)), chunk(range(5, 7))]
    found = {k: find_layer(model, k) for k in range(1, 7)}
    assert [k for k, place in found.items() if place is None] == [3, 4]
    assert all(place[1].layer_number == k for k, place in found.items() if place)


def test_layer_of_a_hybrid_model_is_found_by_its_last_entry() -> None:
    pattern = "*-M*|-M-*-"
    model = [chunk(range(1, 5), hybrid_layer_pattern=pattern)]
    model.append(chunk(range(5, 10), hybrid_layer_pattern=pattern))
    places = [find_layer(model, k) for k in range(1, 6)]
    found = [(place[0], place[1].layer_number) for place in places if place]
    assert found == [(0, 2), (0, 3), (1, 5), (1, 7), (1, 9)]
    assert find_layer(model[:1], 3) is None
