"""Rows of the metrics file, from what Megatron's functions return."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_let.metrics import write as metrics
from megatron_let.metrics.write import (
    LOSS_KEY,
    WEIGHT_KEY,
    MetricsFile,
    alignment_key,
    drop_stale_averages,
)

COSINE_KEY = alignment_key("cosine")

OPTIMIZER = SimpleNamespace(
    param_groups=[{"lr": 0.01, "default_config": True, "params": [torch.zeros(1)]}]
)


def no_forward_step(*args: Any) -> Any:
    raise AssertionError("no microbatch is evaluated here")


@pytest.fixture(autouse=True)
def single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "is_last_rank", lambda: True)
    monkeypatch.setattr(metrics, "get_current_running_global_batch_size", lambda: 8)


def rows(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def train_step(file: MetricsFile, iteration: int, losses: dict[str, Any], norm: Any = 2.0) -> None:
    """Call as Megatron does: the 0-based iteration by name, the optimizer fourth."""
    result = (losses, 0, False, False, 0, norm, None)
    step = file.wrap_train_step(lambda *args, **kwargs: result)
    assert step(None, None, None, OPTIMIZER, None, None, None, iteration=iteration) is result


def evaluate(file: MetricsFile, iteration: int, prefix: str, *losses: float) -> None:
    """Evaluate as Megatron does, on one or several sets."""

    def run_all(*args: Any, **kwargs: Any) -> None:
        for loss in losses:
            result = ({LOSS_KEY: torch.tensor(loss)}, None, False)
            file.wrap_evaluate(lambda forward_step, result=result: result)(no_forward_step)

    file.wrap_evaluate_and_print_results(run_all)(prefix, None, None, None, iteration)


def test_aligned_step_writes_all_columns(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "m.jsonl"
    losses = {LOSS_KEY: torch.tensor(5.0), COSINE_KEY: torch.tensor(0.25), WEIGHT_KEY: 0.1}
    train_step(MetricsFile(path, 64), 0, losses)
    (row,) = rows(path)
    assert list(row) == [
        "iteration", "lm_loss", "let_cosine", "let_weight", "grad_norm", "learning_rate",
        "step_seconds", "tokens_per_second", "max_memory_bytes",
    ]  # fmt: skip
    assert (row["iteration"], row["lm_loss"], row["let_cosine"]) == (1, 5.0, 0.25)
    assert (row["grad_norm"], row["learning_rate"]) == (2.0, 0.01)
    assert row["tokens_per_second"] == pytest.approx(8 * 64 / row["step_seconds"])
    assert row["max_memory_bytes"] > 1e6


def test_step_without_teacher_has_no_cosine_or_weight(tmp_path: Path) -> None:
    train_step(MetricsFile(tmp_path / "m", 64), 3, {LOSS_KEY: 5.0})
    (row,) = rows(tmp_path / "m")
    assert row["iteration"] == 4 and "let_cosine" not in row and "let_weight" not in row


def test_further_rows_are_appended(tmp_path: Path) -> None:
    for iteration in range(3):
        train_step(MetricsFile(tmp_path / "m", 64), iteration, {LOSS_KEY: 5.0})
    assert [row["iteration"] for row in rows(tmp_path / "m")] == [1, 2, 3]


def test_stage_without_loss_writes_nothing(tmp_path: Path) -> None:
    train_step(MetricsFile(tmp_path / "m", 64), 0, {})
    assert not (tmp_path / "m").exists()


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "is_last_rank", lambda: False)
    train_step(MetricsFile(tmp_path / "deep" / "m", 64), 0, {LOSS_KEY: 5.0})
    assert not (tmp_path / "deep").exists()


def test_failed_step_writes_no_row(tmp_path: Path) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no step")

    with pytest.raises(RuntimeError, match="no step"):
        MetricsFile(tmp_path / "m", 64).wrap_train_step(fail)(0, 0, 0, OPTIMIZER, iteration=0)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_non_finite_serialised_as_null(tmp_path: Path, norm: float) -> None:
    """RFC 8259 has no NaN and no Infinity; jq, pandas and JavaScript reject them."""
    train_step(MetricsFile(tmp_path / "m", 64), 0, {LOSS_KEY: torch.tensor(norm)}, norm)
    (row,) = rows(tmp_path / "m")
    assert row["iteration"] == 1 and row.get("grad_norm") is None


def test_missing_gradient_norm_is_omitted(tmp_path: Path) -> None:
    train_step(MetricsFile(tmp_path / "m", 64), 0, {LOSS_KEY: 5.0}, None)
    assert "grad_norm" not in rows(tmp_path / "m")[0]


def test_evaluation_row_names_split(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m", 64)
    evaluate(file, 5, "iteration 5 on validation set", 4.0)
    evaluate(file, 10, "iteration 10 on test set", 3.0)
    assert rows(tmp_path / "m") == [
        {"iteration": 5, "valid_loss": 4.0},
        {"iteration": 10, "test_loss": 3.0},
    ]


def test_further_validation_sets_are_numbered(tmp_path: Path) -> None:
    evaluate(MetricsFile(tmp_path / "m", 64), 5, "on validation set", 4.0, 3.5, 3.0)
    assert rows(tmp_path / "m") == [
        {"iteration": 5, "valid_loss": 4.0},
        {"iteration": 5, "valid_loss_1": 3.5},
        {"iteration": 5, "valid_loss_2": 3.0},
    ]


def test_second_evaluation_of_a_step_writes_no_row(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m", 64)
    evaluate(file, 5, "on validation set", 4.0)
    evaluate(file, 5, "on validation set", 4.5)
    assert rows(tmp_path / "m") == [{"iteration": 5, "valid_loss": 4.0}]


def test_evaluate_outside_eval_loop_writes_no_row(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m", 64)
    file.wrap_evaluate(lambda forward_step: ({LOSS_KEY: 4.0}, None, False))(no_forward_step)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("result", [({}, None, False), (None, None, True)])
def test_evaluation_without_loss_writes_no_row(tmp_path: Path, result: Any) -> None:
    file = MetricsFile(tmp_path / "m", 64)
    wrapped = file.wrap_evaluate_and_print_results(
        lambda *args: file.wrap_evaluate(lambda forward_step: result)(no_forward_step)
    )
    wrapped("on validation set", None, None, None, 5)
    assert not (tmp_path / "m").exists()


def test_wrappers_keep_names_and_results(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m", 64)

    def evaluate(*args: Any) -> tuple[Any, ...]:
        return ({}, "data", False)

    assert file.wrap_evaluate(evaluate).__name__ == "evaluate"
    assert file.wrap_evaluate(evaluate)(no_forward_step) == ({}, "data", False)


@pytest.mark.parametrize(
    ("losses", "left"),
    [
        ({LOSS_KEY: 1}, {LOSS_KEY: 3}),
        ({LOSS_KEY: 1, COSINE_KEY: 1, WEIGHT_KEY: 1}, {LOSS_KEY: 3, COSINE_KEY: 2, WEIGHT_KEY: 2}),
        ({}, {LOSS_KEY: 3, COSINE_KEY: 2, WEIGHT_KEY: 2}),
    ],
    ids=["teacher gone", "aligned", "skipped step"],
)
def test_averages_of_absent_keys_are_dropped(losses: dict[str, int], left: dict[str, int]) -> None:
    totals = {LOSS_KEY: 3, COSINE_KEY: 2, WEIGHT_KEY: 2}
    calls: list[Any] = []
    log = drop_stale_averages(lambda *args, **kwargs: calls.append((args, kwargs)))
    log(losses, totals, 0.01, skipped_iter=1)
    assert calls == [((losses, left, 0.01), {"skipped_iter": 1})]
