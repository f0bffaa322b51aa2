"""The whole quickstart at its smallest, from the command line to the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_let.teacher.precision import default_dtype
from tests.helpers.runs import ROOT, environment
from tests.helpers.text_data import real_texts

# Lines of Python's and the packages' warnings, of logging, and of tqdm's bars.
_NOT_OURS = re.compile(r"(?i)warning|^[WEI]\d{4} |^\[rank|it/s\]|site-packages|^INFO|deprecat")


@pytest.mark.distributed
def test_quickstart_trains_all_three_models_quietly_and_does_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(real_texts()))
    output = tmp_path / "out"
    command = [
        sys.executable, str(ROOT / "tools/quickstart.py"), "--steps", "20",
        "--text", str(tmp_path / "text.txt"), "--output", str(output),
    ]  # fmt: skip
    first, second = (
        subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1500)
        for _ in range(2)
    )
    for run in (first, second):
        assert run.returncode == 0 and run.stderr == "", run.stdout + run.stderr
        assert [line for line in run.stdout.splitlines() if _NOT_OURS.search(line)] == []
    assert second.stdout.count("already done") == 5
    # What the screen did not show.
    assert "documents in" in (output / "quickstart.log").read_text()
    said = re.findall("the teacher computes in (.*)", (output / "let/train.log").read_text())
    dtype, reason = default_dtype()
    assert said[0] == f"{dtype}: {reason}", "shims claim a GPU on a CPU"
    assert json.loads((output / "teacher/config.json").read_text())["num_hidden_layers"] == 3
    steps = {"teacher_training": 140, "baseline": 20, "let": 20}
    for name, number in steps.items():
        rows = map(json.loads, (output / name / "metrics.jsonl").read_text().splitlines())
        assert max(row["iteration"] for row in rows) == number, name
    page = (output / "comparison" / "index.html").read_text()
    assert "The small model&#x27;s own held-out loss is" in page
    assert "step with teacher / without" in page and "seconds in all" in page
    assert (output / "comparison" / "loss_seconds.png").is_file()
