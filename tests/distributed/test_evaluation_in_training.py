"""Evaluations during training: each is of the same tokens, in any layout."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import train

pytestmark = pytest.mark.distributed

Rows = list[dict[str, Any]]
Evaluate = Callable[..., Rows]
# Nothing is learned, so that only the text could change the loss.
STILL = (
    "--lr", 0, "--min-lr", 0, "--train-iters", 6, "--eval-interval", 2, "--let-stop-step", 1,
    "--finetune", "--no-load-optim", "--no-load-rng",
)  # fmt: skip
LAYOUTS = {
    "dp2": (),
    "tp2-cp2-sp": (
        "--tensor-model-parallel-size", 2, "--context-parallel-size", 2, "--sequence-parallel",
    ),
    "pp2": ("--pipeline-model-parallel-size", 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def evaluate(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path, weights: Path
) -> Evaluate:
    """Return a function that runs with flags and returns the rows of the evaluations."""

    def run(*flags: Any, ranks: int = 1) -> Rows:
        finished = train(
            tmp_path_factory.mktemp("run"), "--data-path", data, "--load", weights, *STILL, *flags,
            ranks=ranks, TEACHER=str(teacher),
        )  # fmt: skip
        return [row for row in finished.rows if "valid_loss" in row]

    return run


@pytest.fixture(scope="module")
def alone(evaluate: Evaluate) -> Rows:
    return evaluate()


def test_each_evaluation_is_of_the_same_tokens(alone: Rows) -> None:
    assert [row["iteration"] for row in alone] == [2, 4, 6]
    first = alone[0]["microbatches"]
    assert len(first) == 4 and len(set(first)) == 4
    assert all(row["microbatches"] == first for row in alone)
    assert statistics.mean(first) == pytest.approx(alone[0]["valid_loss"], abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_microbatches_are_those_of_one_process(
    layout: str, evaluate: Evaluate, alone: Rows
) -> None:
    rows = evaluate(*LAYOUTS[layout], ranks=4 if layout.startswith("tp") else 2)
    for row, expected in zip(rows, alone, strict=True):
        assert row["microbatches"] == pytest.approx(expected["microbatches"], abs=3e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_full_validation_reads_each_sample_once(ranks: int, evaluate: Evaluate) -> None:
    rows = evaluate("--full-validation", ranks=ranks)
    losses = rows[0]["microbatches"]
    assert len(set(losses)) == len(losses) >= 2
    assert all(row["microbatches"] == losses for row in rows)


def test_full_validation_under_tensor_parallelism_is_that_of_one_process(
    evaluate: Evaluate,
) -> None:
    flags = ("--full-validation", "--micro-batch-size", 4)
    alone, tp2 = evaluate(*flags), evaluate(*flags, *LAYOUTS["tp2-cp2-sp"], ranks=4)
    for row, expected in zip(tp2, alone, strict=True):
        assert row["microbatches"] == pytest.approx(expected["microbatches"], abs=3e-5)
