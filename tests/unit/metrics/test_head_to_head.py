"""Figures of a report from metrics files whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_let.metrics.head_to_head import (
    aligned_phase_cost,
    comparison_table,
    head_to_head,
    plot_losses,
    sentences,
    steps_to_reach,
)
from megatron_let.metrics.read import RunMetrics, load_metrics


def step(iteration: int, seconds: float = 1.0, **values: Any) -> dict[str, Any]:
    row = {"iteration": iteration, "lm_loss": 5.0, "step_seconds": seconds}
    return row | {"tokens_per_second": 64.0, "max_memory_bytes": 1000 + iteration} | values


def write(path: Path, *rows: dict[str, Any], end: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def run(valid: dict[int, float], aligned_steps: int = 0, last: int = 6) -> RunMetrics:
    aligned = {"let_cosine": 0.5, "let_weight": 0.1}
    steps = {
        i: step(i, 3.0 if i <= aligned_steps else 2.0, **(aligned if i <= aligned_steps else {}))
        for i in range(1, last + 1)
    }
    return RunMetrics(steps, valid)


def test_last_row_of_a_step_counts(tmp_path: Path) -> None:
    rows = [step(1, lm_loss=9.0), step(2), step(1, lm_loss=4.0), {"iteration": 2, "valid_loss": 3}]
    loaded = load_metrics(write(tmp_path / "m.jsonl", *rows))
    assert loaded.steps[1]["lm_loss"] == 4.0
    assert (loaded.last_step, loaded.valid_loss, loaded.final_valid_loss) == (2, {2: 3}, 3)


def test_test_loss_is_not_taken_for_validation(tmp_path: Path) -> None:
    rows = [{"iteration": 2, "valid_loss": 3.0}, {"iteration": 2, "test_loss": 9.0}]
    assert load_metrics(write(tmp_path / "m.jsonl", *rows)).valid_loss == {2: 3.0}


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_line_that_is_still_being_written_is_left_out(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "m.jsonl", step(1), end=json.dumps(step(2))[:cut])
    assert load_metrics(path).last_step == 1


def test_missing_file_is_an_empty_run(tmp_path: Path) -> None:
    empty = load_metrics(tmp_path / "none.jsonl")
    assert (empty.last_step, empty.final_valid_loss, empty.step_seconds()) == (0, None, [])


def test_first_step_is_not_timed() -> None:
    metrics = RunMetrics({1: step(1, 100.0), 2: step(2, 3.0, let_weight=0.1), 3: step(3, 2.0)})
    assert metrics.step_seconds() == [3.0, 2.0]
    assert metrics.step_seconds(aligned=True) == [3.0]
    assert metrics.step_seconds(aligned=False) == [2.0]


@pytest.mark.parametrize(
    ("losses", "target", "expected"),
    [
        ({10: 5.0, 20: 4.0, 30: 3.0}, 4.0, 20.0),
        ({10: 5.0, 20: 4.0, 30: 3.0}, 3.5, 25.0),
        ({10: 5.0, 20: 4.0, 30: 3.0}, 2.9, None),
        ({10: 5.0, 20: 4.0}, 6.0, 10.0),
        ({10: 5.0, 20: 3.0, 30: 4.0, 40: 2.0}, 3.5, 17.5),
        ({}, 1.0, None),
    ],
)
def test_steps_to_reach(losses: dict[int, float], target: float, expected: float | None) -> None:
    assert steps_to_reach(losses, target) == expected


@given(
    st.dictionaries(st.integers(1, 1000), st.floats(0.1, 10), min_size=1),
    st.floats(0.05, 11),
)
def test_step_that_is_reached_lies_between_the_evaluations_around_it(
    losses: dict[int, float], target: float
) -> None:
    reached = steps_to_reach(losses, target)
    below = [s for s in sorted(losses) if losses[s] <= target]
    assert (reached is None) == (not below)
    if reached is not None:
        before = [s for s in losses if s < below[0]]
        assert max(before, default=below[0]) <= reached <= below[0]


def test_cost_of_the_aligned_phase_is_a_ratio_of_medians() -> None:
    assert aligned_phase_cost(run({}, aligned_steps=3)) == 1.5
    assert aligned_phase_cost(run({}, aligned_steps=6)) is None
    assert aligned_phase_cost(run({})) is None


def test_table_has_the_evaluations_that_both_runs_have() -> None:
    baseline, let = run({2: 5.0, 4: 4.0}), run({2: 4.5, 4: 3.5, 6: 3.0}, aligned_steps=3)
    rows = comparison_table(baseline, let)
    assert [row["step"] for row in rows] == [2, 4]
    assert [row["baseline_valid_loss"] for row in rows] == [5.0, 4.0]
    assert [row["let_cosine"] for row in rows] == [0.5, None]


def test_head_to_head_says_how_far_ahead_let_is() -> None:
    runs = {"baseline": run({3: 5.0, 6: 4.0}), "let": run({3: 4.0, 6: 3.0}, aligned_steps=4)}
    summary = head_to_head(runs, steps=6, tokens_per_step=120)
    assert summary["baseline_final_valid_loss"] == 4.0
    assert summary["let_steps_to_baseline_loss"] == 3.0
    assert summary["tokens_per_second"] == {"baseline": 60.0, "let": 40.0}
    assert summary["training_seconds"] == {"baseline": 12.0, "let": 16.0}
    assert summary["aligned_phase_cost"] == 1.5
    assert summary["peak_memory_bytes"] == {"baseline": 1006, "let": 1006}
    json.dumps(summary)
    text = "\n".join(sentences(summary))
    assert "4.0000 at step 3 of 6 (2.00x)" in text and "1.50x one without" in text


def test_head_to_head_says_that_let_never_got_there() -> None:
    runs = {"baseline": run({6: 2.0}), "let": run({6: 3.0}, aligned_steps=6)}
    text = "\n".join(sentences(head_to_head(runs, steps=6, tokens_per_step=1)))
    assert "LET did not reach" in text and "one without" not in text


def test_curves_are_one_png_and_nothing_half_written(tmp_path: Path) -> None:
    runs = {"baseline": run({3: 5.0, 6: 4.0}), "let": run({3: 4.0}, aligned_steps=4)}
    plot_losses(runs, tmp_path / "losses.png", "title")
    assert [path.name for path in tmp_path.iterdir()] == ["losses.png"]
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_runs_without_a_row_can_be_drawn(tmp_path: Path) -> None:
    plot_losses({"baseline": RunMetrics(), "let": RunMetrics()}, tmp_path / "losses.png", "title")
    assert (tmp_path / "losses.png").is_file()
