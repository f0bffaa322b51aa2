"""The cosine benchmark's CPU mode, on few tokens."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parents[3]


def test_cpu_mode_writes_one_row_per_provider_and_pass(tmp_path: Path) -> None:
    path = tmp_path / "cosine.csv"
    command = [
        sys.executable, str(ROOT / "tools" / "benchmark" / "cosine_interp.py"), "--device", "cpu",
        "--tokens", "96", "--seconds", "0.01", "--providers", "fused", "eager", "--csv", str(path),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    # Two pairs of widths, two providers, two passes.
    assert len(rows) == 2 * 2 * 2
    assert {row["pass"] for row in rows} == {"forward", "both"}
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["cosine_error"]) < 1e-5 and float(row["gradient_error"]) < 1e-2
        assert row["machine"] and row["torch"] and row["date"]
