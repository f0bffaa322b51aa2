"""The state of a run, from the files of its folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.programs import write_program
from tests.helpers.runs import ROOT, environment


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 50 steps in its second attempt, at step 40."""
    for number in (1, 2):
        attempt = tmp_path / f"attempts/000{number}"
        attempt.mkdir(parents=True)
        (attempt / "command.txt").write_text("python -m x --train-iters 50 --lr 1 ")
    (tmp_path / "attempts/0001/result.tsv").write_text("1000\t137\t3\t20\n")
    (tmp_path / "attempts.tsv").write_text("1\t7\t0\t900\tn[1-2]\n2\t7\t20\t1000\tn[1-2]\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").write_text("30")
    rows = (
        {"iteration": i, "lm_loss": 5 - i / 10, "step_seconds": 2.0, "tokens_per_second": 1500.0}
        for i in range(1, 41)
    )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def status(folder: Path, path: str = "") -> tuple[int, dict[str, str]]:
    program = [sys.executable, str(ROOT / "tools/run_status.py"), str(folder)]
    result = subprocess.run(program, text=True, capture_output=True, env=environment(PATH=path))
    return result.returncode, {x[:11].strip(): x[12:] for x in result.stdout.splitlines()}


def test_running_attempt_shows_progress_speed_and_checkpoint(run: Path) -> None:
    code, lines = status(run)
    assert code == 0
    assert lines["state"] == "unknown, no squeue here"
    assert lines["step"] == "40 of 50 (80.0 %)" and lines["loss"] == "1.0000"
    assert lines["speed"] == "1,500 tokens/s, 2.00 s per step"
    assert lines["time left"] == "0:00:20 of training"
    assert lines["checkpoint"].startswith("step 30, ")
    assert lines["attempts"] == "2, the last as job 7 on n[1-2]"
    assert lines["last end"] == "attempt 1 with code 137 of rank 3, saved step 20"


@pytest.mark.parametrize(
    ("command", "state"),
    [
        ("echo RUNNING", "running"),
        ("true", "not queued"),
        ("echo RUNNING; echo PENDING", "running, pending"),
        ("echo 'error: Unable to contact controller' >&2; exit 1", "unknown, squeue failed"),
    ],
)
def test_state_is_unknown_if_squeue_fails(
    run: Path, tmp_path: Path, command: str, state: str
) -> None:
    path = write_program(tmp_path / "squeue", command)
    assert status(run, path)[1]["state"].startswith(state)


def test_state_is_that_of_the_owners_jobs_with_the_runs_name(run: Path, tmp_path: Path) -> None:
    path = write_program(tmp_path / "squeue", 'echo "$@" >&2; exit 1')
    link = tmp_path.with_name(f"{tmp_path.name}-link")
    link.symlink_to(run)
    shown = status(link, path)[1]["state"]
    assert f"--user={os.getuid()} " in shown
    assert set(re.search(r"--name=(\S+)", shown)[1].split(",")) == {link.name, run.name}  # type: ignore[index]


def test_control_files_change_state(run: Path) -> None:
    (run / "checkpoints/STOP").touch()
    assert "asked to stop" in status(run)[1]["state"]
    (run / "checkpoints/DONE").touch()
    assert status(run)[1]["state"] == "done"


def test_run_before_first_step_has_no_checkpoint(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "checkpoints/latest_checkpointed_iteration.txt").unlink()
    code, lines = status(run)
    assert (code, lines["step"], lines["checkpoint"]) == (0, "0 of 50 (0.0 %)", "none")


def test_other_folder_is_rejected(tmp_path: Path) -> None:
    assert status(tmp_path)[0] == 2
