"""A sweep of short runs, from the command line to the page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.runs import ROOT, environment


@pytest.mark.distributed
def test_sweep_continues_after_failed_run_and_skips_finished_runs(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        yaml.safe_dump(
            {
                "title": "Two",
                "baseline": "none",
                "recipes": {"tiny": str(ROOT / "configs/tiny.yaml")},
                "seeds": [1],
                "variants": {
                    "none": {"recipe": "tiny", "let-method": "none"},
                    "broken": {"recipe": "tiny", "let-layer": 9},
                    "let": {"recipe": "tiny"},
                },
            }
        )
    )
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
