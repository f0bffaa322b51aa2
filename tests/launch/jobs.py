"""Jobs of the launch scripts on the virtual cluster: submit, observe, disturb."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.runs import ROOT, Run
from tests.launch.cluster import Cluster

# Overrides of the 7B recipe: size, precision and data.
SMALL = (
    "--num-layers", 4, "--hidden-size", 64, "--ffn-hidden-size", 176, "--num-attention-heads", 4,
    "--seq-length", 64, "--max-position-embeddings", 64, "--tokenizer-type", "NullTokenizer",
    "--vocab-size", 256, "--make-vocab-size-divisible-by", 64, "--split", "90,10,0",
    "--num-workers", 0, "--micro-batch-size", 2, "--global-batch-size", 8, "--no-bf16",
    "--lr", 1e-3, "--min-lr", 1e-4, "--lr-warmup-iters", 2, "--eval-interval", 10000,
    "--eval-iters", 1, "--log-interval", 1, "--let-stop-step", 6, "--let-teacher-dtype", "fp32",
    "--save-retain-interval", 10000,
)  # fmt: skip

_SECONDS_PER_QUESTION = 0.5
# Any other state, such as REQUEUED or SIGNALING, is temporary.
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Job:
    """One submitted run."""

    def __init__(self, cluster: Cluster, number: str, name: str, runs: Path) -> None:
        self._cluster = cluster
        self.number = number
        self.folder = runs / name
        self.output_path = runs / f"{name}.out"

    @property
    def output(self) -> str:
        """Return the job's output over all requeues."""
        return self.output_path.read_text() if self.output_path.exists() else ""

    @property
    def run(self) -> Run:
        """Return the run's metrics."""
        return Run(0, self.output, self.folder / "metrics.jsonl")

    @property
    def iteration(self) -> int:
        """Return the last iteration in the metrics; 0 for none."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        # The last line may be incomplete.
        *_, last = ["{}", *text[: text.rfind("\n") + 1].splitlines()]
        return int(json.loads(last).get("iteration", 0))

    @property
    def checkpoint(self) -> int:
        """Return the iteration of the last complete checkpoint; 0 for none."""
        path = self.folder / "checkpoints/latest_checkpointed_iteration.txt"
        return int(path.read_text() or 0) if path.exists() else 0

    def details(self) -> dict[str, str]:
        """Return Slurm's fields of the job: JobState, ExitCode, Restarts, ..."""
        text = self._cluster.command("scontrol", "show", "job", "-o", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def until(self, condition: Callable[[], Any], what: str, timeout: float = 300) -> None:
        """Wait for a condition; fail with the job's output on a timeout or if the job ends."""
        deadline, asked = time.monotonic() + timeout, 0.0
        while not condition():
            # scontrol takes longer than any condition.
            if time.monotonic() > asked + _SECONDS_PER_QUESTION:
                asked = time.monotonic()
                state = self.details()["JobState"]
                if (state in ENDS and not condition()) or asked > deadline:
                    raise AssertionError(f"{state} before {what}:\n{self.output[-6000:]}")
            time.sleep(0.05)

    def wait(self, timeout: float = 300) -> dict[str, str]:
        """Wait for the job's end."""
        deadline = time.monotonic() + timeout
        while (found := self.details())["JobState"] not in ENDS:
            if time.monotonic() > deadline:
                state = found["JobState"]
                raise AssertionError(f"{state} before its end:\n{self.output[-6000:]}")
            time.sleep(_SECONDS_PER_QUESTION)
        return found

    def signal(self, name: str) -> None:
        """Send the signal that Slurm sends before the time limit."""
        self._cluster.command("scancel", f"--signal={name}", self.number)

    def cancel(self) -> None:
        """Cancel the job and wait until its nodes are free."""
        self._cluster.command("scancel", self.number)
        self.wait()
        self.until_nodes_are_free()

    def rank(self, number: int) -> psutil.Process:
        """Return the Python process of one rank, which is older than its helper processes."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.Error):
                if "megatron_let.pretrain" in (process.info["cmdline"] or ()) and (
                    "python" in process.info["cmdline"][0]
                ):
                    variables = process.environ()
                    ours = variables.get("SLURM_JOB_ID") == self.number
                    if ours and variables.get("RANK") == str(number):
                        found.append(process)
        assert found, f"rank {number} of job {self.number} does not run"
        return min(found, key=lambda process: process.create_time())

    def writers(self) -> list[psutil.Process]:
        """Return the checkpoint-writing processes of ranks 0 and 1."""
        return [p for number in range(2) for p in self.rank(number).children(recursive=True)]

    def until_nodes_are_free(self, timeout: float = 60) -> None:
        """Wait until the job neither runs nor is being cleaned up."""
        deadline = time.monotonic() + timeout
        while self._cluster.command("squeue", "-h", "-t", "R,CG", "-j", self.number):
            assert time.monotonic() < deadline, f"the nodes are not free after {timeout} s"
            time.sleep(_SECONDS_PER_QUESTION)


class Launcher:
    """Submits a script of launch/ to the virtual cluster, as a user does."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path, teacher: Path) -> None:
        self.cluster = cluster
        self.runs = folder / "runs"
        self.runs.mkdir()
        self.site = folder / "site.sh"
        self.site.write_text(
            f"DATA={data} TEACHER={teacher} LET_FABRIC=ethernet\n"
            f': "${{LET_PYTHON:={sys.executable}}}"\n'
            f': "${{LET_RUNS:={self.runs}}}" "${{LET_DISK_GIB:=0}}"\n'
            ': "${LET_GPUS_PER_NODE:=0}" "${LET_RANKS_PER_NODE:=1}" "${LET_PREFLIGHT:=off}"\n'
            "export GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1\n"
        )

    def environment(self, **variables: str) -> dict[str, str]:
        return {**self.cluster.environment, "LET_SITE": str(self.site), **variables}

    def submit(
        self,
        name: str,
        *flags: object,
        options: tuple[str, ...] = ("--nodes=2",),
        script: str = "launch/pretrain_7b_let.sh",
        runs: Path | None = None,
        **variables: str,
    ) -> Job:
        """Run `sbatch OPTIONS SCRIPT -- FLAGS` in the repository's root."""
        runs = runs or self.runs
        output = f"--output={self.runs}/%x.out"
        command = ["sbatch", "--parsable", f"--job-name={name}", "--time=20", output, *options]
        result = subprocess.run(
            [*command, script, "--", *map(str, (*SMALL, *flags))],
            cwd=ROOT, env=self.environment(LET_RUNS=str(runs), **variables), text=True,
            capture_output=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        job = Job(self.cluster, result.stdout.strip(), name, runs)
        job.output_path = self.runs / f"{name}.out"
        return job


def kill(process: psutil.Process, number: signal.Signals) -> float:
    """Send a signal; return the current time."""
    os.kill(process.pid, number)
    return time.monotonic()
