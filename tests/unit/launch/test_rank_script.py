"""The log and the exit code of one rank."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "launch/lib/rank.sh"
TRACEBACK = "print('Traceback\\n' * 3000); print('last words', end=''); raise SystemExit(3)"


def run_rank(output: Path, rank: int, code: str, attempt: int = 1) -> tuple[int, str]:
    """Run a rank of four with this Python code; return its exit code and what it copied."""
    (output / "exits").mkdir(exist_ok=True)
    (output / "logs").mkdir(exist_ok=True)
    variables = {
        "OUTPUT": str(output), "LET_STEP_DIR": str(output), "LET_ATTEMPT": str(attempt),
        "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "RANK": str(rank), "WORLD_SIZE": "4",
    }  # fmt: skip
    process = subprocess.run(
        ["bash", SCRIPT, "python3", "-u", "-c", code], env={**os.environ, **variables},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    return process.returncode, process.stdout


def log(output: Path, rank: int) -> Path:
    return output / f"logs/rank_{rank:04d}.log"


def test_silent_rank_has_no_log(tmp_path: Path) -> None:
    assert run_rank(tmp_path, 1, "pass") == (0, "")
    assert not log(tmp_path, 1).exists()


@pytest.mark.parametrize("rank", [0, 3])
def test_first_and_last_rank_have_a_log_and_are_copied(rank: int, tmp_path: Path) -> None:
    assert run_rank(tmp_path, rank, "print('loss')") == (0, "loss\n")
    assert log(tmp_path, rank).read_text().splitlines()[1:] == ["loss"]


def test_failing_rank_keeps_its_whole_traceback_and_its_exit_code(tmp_path: Path) -> None:
    _, copied = run_rank(tmp_path, 2, TRACEBACK)
    head, *lines = log(tmp_path, 2).read_text().splitlines()
    assert head.startswith("==== attempt 1, job 7, node n1") and copied == ""
    assert lines == ["Traceback"] * 3000 + ["", "last words"]
    assert (tmp_path / "exits/2").read_text().split()[1:4] == ["3", "2", "n1"]


def test_later_attempt_is_marked_even_if_it_prints_nothing(tmp_path: Path) -> None:
    run_rank(tmp_path, 1, "print('a warning')")
    run_rank(tmp_path, 1, "raise SystemExit(9)", attempt=2)
    first, warning, second = log(tmp_path, 1).read_text().splitlines()
    assert first.startswith("==== attempt 1") and warning == "a warning"
    assert second.startswith("==== attempt 2")
