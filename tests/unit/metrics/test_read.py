"""Reading a metrics file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_let.errors import LETError
from megatron_let.metrics.read import RunMetrics, load_metrics


def step(iteration: int, seconds: float = 1.0, **values: Any) -> dict[str, Any]:
    return {"iteration": iteration, "lm_loss": 5.0, "step_seconds": seconds} | values


def write(path: Path, *rows: dict[str, Any], end: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def test_step_taken_again_replaces_the_rows_from_it_on(tmp_path: Path) -> None:
    losses = [{"iteration": i, "valid_loss": 9.0 - i, "microbatches": [1.0]} for i in range(1, 5)]
    first = [row for i in range(1, 5) for row in (step(i, lm_loss=9.0), losses[i - 1])]
    # Resumed at step 2, it has other evaluations.
    again = [step(3, lm_loss=4.0), step(4, lm_loss=3.0)]
    path = write(tmp_path / "m.jsonl", *first, {"iteration": 2, "changed": {"lr": [1, 2]}}, *again)
    loaded = load_metrics(path)
    assert [row["lm_loss"] for row in loaded.steps.values()] == [9.0, 9.0, 4.0, 3.0]
    assert loaded.valid_loss == {1: 8.0, 2: 7.0} and list(loaded.valid_microbatches) == [1, 2]
    assert loaded.changes == {2: {"lr": [1, 2]}}
    # Killed before it was as far as before, it is not finished.
    write(path, *first, *again[:1])
    assert load_metrics(path).last_step == 3


# Attempts of one run: where each resumes, in percent of what was saved, the value of a setting, and
# how many steps it takes.
ATTEMPTS = st.lists(st.tuples(st.integers(0, 100), st.sampled_from("ab"), st.integers(0, 5)))


@given(ATTEMPTS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_changes_are_those_between_the_steps_that_count(
    tmp_path: Path, attempts: list[tuple[int, str, int]]
) -> None:
    rows: list[dict[str, Any]] = []
    had: list[str] = []
    stored = "a"
    for percent, value, steps in [(0, "a", 3), *attempts]:
        had = had[: len(had) * percent // 100]
        # As a run writes it: beside the setting of the attempt before.
        if value != stored:
            rows.append({"iteration": len(had), "changed": {"x": [stored, value]}})
        stored = value
        for _ in range(steps):
            had.append(value)
            rows.append(step(len(had)))
    loaded = load_metrics(write(tmp_path / "m.jsonl", *rows))
    changes = {it: c["x"] for it, c in loaded.changes.items() if c and 0 < it < len(had)}
    assert list(loaded.steps)[: len(had)] == list(range(1, len(had) + 1))
    if len(loaded.steps) == len(had):
        assert changes == {
            i: [before, since]
            for i, (before, since) in enumerate(itertools.pairwise(had), 1)
            if before != since
        }


def test_test_loss_is_not_validation_loss(tmp_path: Path) -> None:
    rows = [{"iteration": 2, "valid_loss": 3.0}, {"iteration": 2, "test_loss": 9.0}]
    assert load_metrics(write(tmp_path / "m.jsonl", *rows)).valid_loss == {2: 3.0}


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_incomplete_last_line_is_ignored(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "m.jsonl", step(1), end=json.dumps(step(2))[:cut])
    assert load_metrics(path).last_step == 1


def test_missing_file_is_empty_run(tmp_path: Path) -> None:
    empty = load_metrics(tmp_path / "none.jsonl")
    assert (empty.last_step, empty.final_valid_loss, empty.step_seconds()) == (0, None, [])


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([5.0, 4.0], None),
        ([5.0, None, None], 2),
        ([None, None], 1),
        ([5.0, None, 4.0], None),
        ([5.0, None, 4.0, None], 4),
        ([], None),
    ],
)
def test_diverged_run_has_no_finite_loss_from_that_step_on(
    tmp_path: Path, losses: list[float | None], expected: int | None
) -> None:
    rows = [step(index, lm_loss=loss) for index, loss in enumerate(losses, 1)]
    loaded = load_metrics(write(tmp_path / "m.jsonl", *rows))
    assert loaded.diverged_at == expected
    # A loss that is not finite can still be formatted.
    assert all(f"{row['lm_loss']:.3f}" for row in loaded.steps.values())


def test_step_seconds_exclude_first_step() -> None:
    metrics = RunMetrics({1: step(1, 100.0), 2: step(2, 3.0, let_weight=0.1), 3: step(3, 2.0)})
    assert metrics.step_seconds() == [3.0, 2.0]
    assert metrics.step_seconds(aligned=True) == [3.0]
    assert metrics.step_seconds(aligned=False) == [2.0]


@pytest.mark.parametrize(
    "change", [{"step_seconds": None}, {"step_seconds": 0}, {"lm_loss": "5.0"}]
)
def test_value_that_no_run_writes_is_refused_with_its_line(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    row = {"iteration": 1, "lm_loss": 5.0, "step_seconds": 2.0, "tokens_per_second": 9.0}
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (row, row | change)))
    with pytest.raises(LETError, match=f"line 2: {next(iter(change))} is"):
        load_metrics(path)
