"""Preprocessing as jobs of a real Slurm: a task killed, the command repeated, the same bytes."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.runs import ROOT
from tests.helpers.text_data import (
    files_of,
    real_texts,
    run,
    save_hugging_face_tokenizer,
    write_input,
)
from tests.launch.cluster import NODES, Cluster

pytestmark = pytest.mark.distributed


# Rank of the task that the test kills.
KILLED = 3


class Preprocessing:
    """The command under test, with the partition from a site file."""

    def __init__(self, cluster: Cluster, prefix: Path, inputs: Path, tokenizer: Path) -> None:
        self._cluster = cluster
        self.prefix, self.work = prefix, prefix.with_name("out.work")
        self.site = tokenizer.with_name("site.sh")
        # One task per node at a time.
        self.site.write_text(
            "SBATCH_PARTITION=main SBATCH_TIMELIMIT=10\n"
            "SBATCH_EXCLUSIVE=exclusive SBATCH_MEM_PER_CPU=50\n"
        )
        self._environment = {
            **cluster.environment,
            "LET_SITE": str(self.site),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self._command = [
            sys.executable, "tools/preprocess_data.py", "--executor", "slurm", "--input", inputs,
            "--output-prefix", self.prefix, "--tokenizer-model", tokenizer, "--split", "8,1,1",
        ]  # fmt: skip

    def __call__(self, code: int = 0) -> str:
        """Run the command; return what it prints."""
        result = subprocess.run(
            self._command, cwd=ROOT, env=self._environment, capture_output=True, text=True
        )
        assert result.returncode == code, result.stderr
        return " ".join(result.stderr.split())

    def stop_task(self, rank: int) -> list[psutil.Process]:
        """Stop a task while it writes its shard; return its processes."""
        deadline = time.monotonic() + 120
        while not list(self.work.glob(f"{rank:05d}_*.bin")):
            assert time.monotonic() < deadline, self._cluster.command("squeue")
            time.sleep(0.02)
        found = [p for p in psutil.process_iter(["cmdline"]) if self._is_task(p, rank)]
        assert found
        for process in found:
            process.suspend()
        assert not (self.work / f"{rank:05d}.json").exists()
        return found

    def _is_task(self, process: psutil.Process, rank: int) -> bool:
        command = " ".join(process.info["cmdline"] or ())
        # The script of the job has the same variables.
        if "python" not in command or f"{self.work}/" not in command:
            return False
        with contextlib.suppress(psutil.Error):
            return process.environ().get("SLURM_ARRAY_TASK_ID") == str(rank)
        return False

    def wait_for_queue(self) -> None:
        """Wait until no job is left."""
        deadline = time.monotonic() + 240
        while self._cluster.command("squeue", "--noheader"):
            assert time.monotonic() < deadline, self._cluster.command("squeue")
            time.sleep(0.2)


def test_killed_task_is_repeated_and_ends_with_a_local_runs_bytes(
    cluster: Cluster, tmp_path: Path
) -> None:
    tokenizer = save_hugging_face_tokenizer(tmp_path / "tokenizer")
    inputs = tmp_path / "in"
    inputs.mkdir()
    for part in range(8):
        # The task to kill runs for seconds.
        texts = real_texts() * (40 if part == KILLED else 1)
        write_input(inputs / f"{part}.jsonl.zst", texts[part:], ("Github", "Books3"))
    run([inputs], tmp_path / "local" / "out", tokenizer, split=(8.0, 1.0, 1.0), workers=2)
    (tmp_path / "slurm").mkdir()
    preprocess = Preprocessing(cluster, tmp_path / "slurm" / "out", inputs, tokenizer)
    printed = preprocess()
    assert "submitted: job" in printed
    stopped = preprocess.stop_task(KILLED)
    assert "nothing to submit" in preprocess()
    for process in stopped:
        process.kill()
    preprocess.wait_for_queue()
    assert not preprocess.prefix.with_name("out.report.json").exists()
    number = printed.split("submitted: job ")[1].split()[0]
    tasks = cluster.command("scontrol", "show", "job", "-o", number)
    assert set(re.findall(r" NodeList=(\w+)", tasks)) == set(NODES)
    done = {path: path.stat().st_mtime_ns for path in preprocess.work.glob("0000?.json")}
    assert len(done) == 7
    again = preprocess()
    number = again.split("submitted: job ")[1].split()[0]
    assert "ArrayTaskId=0 " in cluster.command("scontrol", "show", "job", "-o", number)
    assert done == {path: path.stat().st_mtime_ns for path in done}
    preprocess.wait_for_queue()
    assert files_of(tmp_path / "slurm") == files_of(tmp_path / "local")
    assert "complete: nothing to do" in preprocess()


def test_slurm_without_partition_is_a_usage_error(cluster: Cluster, tmp_path: Path) -> None:
    tokenizer = save_hugging_face_tokenizer(tmp_path / "tokenizer")
    source = write_input(tmp_path / "in.jsonl", ["text"])
    preprocess = Preprocessing(cluster, tmp_path / "out", source, tokenizer)
    preprocess.site.write_text("")
    assert "SBATCH_PARTITION" in preprocess(code=2)
