"""The one-GPU benchmark: its figures on synthetic steps, and the tool at a tiny size."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import ROOT
from tools.benchmark import step_time

BASELINE, DISTILLED = 100, 104


def synthetic_steps(
    seconds: list[float], peaks: list[int], counted: int = 3
) -> list[dict[str, Any]]:
    """Return blocks of equal steps; the first steps of a block are slower and use more memory."""
    settling = [{"step_seconds": 99.0, "max_memory_bytes": 10**9}] * step_time.SETTLING
    return [
        step
        for time, bytes_ in zip(seconds, peaks, strict=True)
        for step in (*settling, *[{"step_seconds": time, "max_memory_bytes": bytes_}] * counted)
    ]


def test_first_steps_of_a_block_are_skipped() -> None:
    taken = step_time.blocks(synthetic_steps([1.0, 1.1, 1.0], [BASELINE, DISTILLED, BASELINE]), 3)
    assert [len(block) for block in taken] == [3, 3, 3]
    assert {step["step_seconds"] for block in taken for step in block} == {1.0, 1.1}


@pytest.mark.parametrize("num_blocks", [0, 2, 4])
def test_even_number_of_blocks_raises(num_blocks: int) -> None:
    with pytest.raises(ValueError, match="not an odd number of blocks of 5"):
        step_time.blocks(synthetic_steps([1.0] * num_blocks, [BASELINE] * num_blocks), 3)


def test_incomplete_block_raises() -> None:
    with pytest.raises(ValueError, match="14 steps"):
        step_time.blocks(synthetic_steps([1.0] * 3, [BASELINE] * 3)[:-1], 3)


def test_ratio_ignores_linear_slowdown_of_the_machine() -> None:
    """The baseline takes 1.0, 1.2, 1.4 s; each block with a teacher 4 % more than interpolated."""
    seconds = [1.0, 1.04 * 1.1, 1.2, 1.04 * 1.3, 1.4]
    taken = step_time.blocks(synthetic_steps(seconds, [BASELINE] * 5), 3)
    assert step_time.step_ratios(taken) == pytest.approx([1.04, 1.04])


def test_ratio_ignores_one_slow_step() -> None:
    steps = synthetic_steps([1.0, 1.04, 1.0], [BASELINE] * 3)
    steps[step_time.SETTLING + 3 + step_time.SETTLING + 1] = {"step_seconds": 50.0}
    assert step_time.step_ratios(step_time.blocks(steps, 3)) == pytest.approx([1.04])


def test_figures_of_three_cycles_equal_values_by_hand() -> None:
    seconds, peaks = [1.0, 1.02, 1.0, 1.04, 1.0, 1.06, 1.0], [100, 104, 100, 103, 100, 102, 101]
    row = step_time.figures(step_time.blocks(synthetic_steps(seconds, peaks), 3), BASELINE)
    assert row == {
        "step_ratio": 1.04, "step_ratio_q25": 1.03, "step_ratio_q75": 1.05,
        "baseline_seconds": 1.0, "peak_ratio": 1.04, "peak_ratio_after": 1.01,
        "baseline_peak_gib": 0.0, "cycles": 3, "steps": 3,
    }  # fmt: skip


def test_missing_peaks_give_no_peak_ratios() -> None:
    taken = step_time.blocks(synthetic_steps([1.0] * 5, [BASELINE] * 5), 3)
    row = step_time.figures(taken, None)
    assert row["step_ratio"] == 1
    assert row["peak_ratio"] is row["peak_ratio_after"] is row["baseline_peak_gib"] is None


@pytest.mark.slow
@pytest.mark.distributed
def test_every_other_block_has_a_teacher(tmp_path: Path, teacher: Path) -> None:
    options = argparse.Namespace(
        config=ROOT / "configs" / "tiny.yaml", micro_batch_size=2, microbatches=2, cycles=1, steps=1
    )
    steps = step_time.train("let", tmp_path, teacher, options, [])
    block = step_time.SETTLING + options.steps
    assert len(steps) == 3 * block
    assert ["let_cosine" in step for step in steps] == [False] * block + [True] * block + (
        [False] * block
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_tool_writes_a_row_per_method(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ModelOpt's row is included if it is installed."""
    path = tmp_path / "step_time.csv"
    command = [
        *("step_time.py", "--config", str(ROOT / "configs" / "tiny.yaml"), "--csv", str(path)),
        *("--teacher", str(teacher), "--micro-batch-size", "2", "--microbatches", "2"),
        *("--cycles", "2", "--steps", "2"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    assert step_time.main() == 0
    rows = list(csv.DictReader(path.open(newline="")))
    assert [row["method"] for row in rows] == step_time.methods()
    assert all(0.5 < float(row["step_ratio"]) < 20 and row["cycles"] == "2" for row in rows)
