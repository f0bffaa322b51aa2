"""When the guard warns, and that it gives each warning once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from megatron_let.errors import LETError
from megatron_let.metrics.guard import WINDOW, Guard, load_guard


def watch(
    cosines: Iterable[float] = (),
    losses: dict[int, float] | None = None,
    baseline: dict[int, float] | None = None,
) -> list[str]:
    warnings: list[str] = []
    guard = Guard(baseline or {}, warnings.append)
    for iteration, cosine in enumerate(cosines, start=1):
        guard.observe({"iteration": iteration, "lm_loss": 5.0, "let_cosine": cosine})
    for iteration, loss in (losses or {}).items():
        guard.observe({"iteration": iteration, "valid_loss": loss})
    return warnings


RISING = [i / 500 for i in range(3 * WINDOW)]


@pytest.mark.parametrize(
    ("cosines", "expected"),
    [
        (RISING, 0),
        ([0.4] * 3 * WINDOW, 0),
        ([0.4 + 0.005 * (-1) ** i for i in range(3 * WINDOW)], 0),
        ([0.4 - 5e-5 * i for i in range(3 * WINDOW)], 0),
        (RISING[::-1], 1),
        (RISING + RISING[::-1], 1),
        (RISING[::-1][: 2 * WINDOW - 1], 0),
    ],
    ids=["rising", "level", "noisy", "hardly falling", "falling", "turning", "too short"],
)
def test_falling_cosine_warns_once(cosines: list[float], expected: int) -> None:
    warnings = watch(cosines)
    assert len(warnings) == expected
    assert all("--let-weight" in text for text in warnings)


BASELINE = {10: 6.0, 20: 5.0, 30: 4.5, 40: 4.2}


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({10: 6.1, 20: 4.9, 30: 4.6}, 0),
        ({10: 6.1, 20: 5.1, 30: 4.6}, 1),
        ({10: 6.005, 20: 5.005, 30: 4.505}, 0),
        ({11: 9.0, 21: 8.0}, 0),
        ({10: 5.0, 20: 4.0}, 0),
    ],
    ids=["once", "twice in a row", "within the margin", "other steps", "better"],
)
def test_loss_above_baseline_twice_in_a_row_warns(losses: dict[int, float], expected: int) -> None:
    warnings = watch(losses=losses, baseline=BASELINE)
    assert len(warnings) == expected
    if warnings:
        assert all(text in warnings[0] for text in ("step 20", "5.1000", "5.0000"))


def test_loss_rising_twice_in_a_row_warns_once() -> None:
    assert not watch(losses={10: 5.0, 20: 5.1, 30: 5.0})
    assert not watch(losses={10: 6.0, 20: 5.1, 30: 5.2})
    (warning,) = watch(losses={10: 6.0, 20: 5.0, 30: 5.1, 40: 5.2, 50: 5.3})
    assert "5.2000 at step 40" in warning


def test_rows_without_teacher_never_warn() -> None:
    warnings: list[str] = []
    guard = Guard({}, warnings.append)
    for iteration in range(300):
        guard.observe({"iteration": iteration, "lm_loss": float(iteration)})
    assert not warnings


def test_resumed_run_counts_earlier_evaluations(tmp_path: Path) -> None:
    metrics, baseline = tmp_path / "metrics.jsonl", tmp_path / "baseline.jsonl"
    metrics.write_text(json.dumps({"iteration": 10, "valid_loss": 6.1}) + "\n")
    rows = ({"iteration": step, "valid_loss": loss} for step, loss in BASELINE.items())
    baseline.write_text("".join(json.dumps(row) + "\n" for row in rows))
    warnings: list[str] = []
    guard = load_guard(metrics, baseline, warnings.append)
    guard.observe({"iteration": 20, "valid_loss": 5.1})
    assert len(warnings) == 1


def test_baseline_without_evaluation_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(LETError, match="--let-guard-baseline"):
        load_guard(tmp_path / "m", tmp_path / "nowhere", print)
