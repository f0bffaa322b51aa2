"""A sweep of short runs, from the command line to the page."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.helpers.runs import ROOT, environment

pytestmark = pytest.mark.distributed


def write_sweep(path: Path, variants: dict[str, dict[str, Any]]) -> Path:
    values = {
        "title": "Two",
        "baseline": "none",
        "recipes": {"tiny": str(ROOT / "configs/tiny.yaml")},
        "seeds": [1],
        "variants": variants,
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_sweep_continues_after_failed_run_and_skips_finished_runs(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    variants = {
        "none": {"recipe": "tiny", "let-method": "none"},
        "broken": {"recipe": "tiny", "let-layer": 9},
        "let": {"recipe": "tiny"},
    }
    sweep = write_sweep(tmp_path / "sweep.yaml", variants)
    output = tmp_path / "runs"
    command = [
        sys.executable, str(ROOT / "tools/sweep.py"), str(sweep), "--output", str(output), "--",
        "--data-path", str(data), "--train-iters", "5", "--let-stop-step", "3",
    ]  # fmt: skip
    variables = environment(TEACHER=str(teacher), DATA=str(data))
    first, second = (
        subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
        for _ in range(2)
    )
    # The failed variant does not stop the others.
    assert first.returncode == second.returncode == 1, first.stdout + first.stderr
    assert "broken-seed1: The broken run failed:" in first.stderr
    assert "--let-layer is 9 but the student has 4" in first.stderr
    assert second.stdout.count("already done") == 2
    assert (output / "comparison" / "index.html").is_file()
    for name in ("none", "let"):
        rows = (output / name / "seed-1" / "metrics.jsonl").read_text().splitlines()
        assert sum("lm_loss" in json.loads(row) for row in rows) == 5
    # Another setting is not the finished run's.
    third = subprocess.run([*command, "--lr=5"], env=variables, capture_output=True, text=True)
    assert third.returncode == 2 and "lr is" in third.stderr and "and 5 here" in third.stderr


def processes_of(output: Path) -> list[psutil.Process]:
    """Return the processes that name the folder in their command line."""
    found = psutil.process_iter(["cmdline"])
    return [p for p in found if any(str(output) in word for word in p.info["cmdline"] or ())]


def test_interrupted_parallel_sweep_leaves_no_process_and_says_how_to_go_on(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    variants = {"none": {"recipe": "tiny", "let-method": "none"}, "let": {"recipe": "tiny"}}
    sweep, output = write_sweep(tmp_path / "sweep.yaml", variants), tmp_path / "runs"
    running = subprocess.Popen(
        [
            sys.executable, str(ROOT / "tools/sweep.py"), str(sweep), "--output", str(output),
            "--jobs", "2", "--", "--data-path", str(data), "--train-iters", "100000",
            "--eval-iters", "0",
        ],
        env=environment(TEACHER=str(teacher), DATA=str(data)),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = [output / name / "seed-1" / "metrics.jsonl" for name in variants]
    try:
        while not all(path.is_file() and path.stat().st_size for path in metrics):
            assert running.poll() is None
            time.sleep(0.2)
        assert len(processes_of(output)) == 5, "the sweep, and two runs of torchrun and one rank"
        running.send_signal(signal.SIGTERM)
        _, errors = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130
    assert "interrupted; continue with: " in errors and str(sweep) in errors
    assert processes_of(output) == []
