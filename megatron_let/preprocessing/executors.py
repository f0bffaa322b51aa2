"""Run a job's tasks with datatrove: processes of this machine, a Ray cluster, or Slurm."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import logging
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from megatron_let.data.text_tokenizer import token_bytes
from megatron_let.errors import LETError, first_line
from megatron_let.preprocessing.job import Job
from megatron_let.preprocessing.shards import TokenizeFiles

_SITE = Path(__file__).resolve().parents[2] / "launch" / "site.sh"
_PR_SET_PDEATHSIG = 1
_SECONDS_BETWEEN_LINES = 30.0
# A document of 16 MiB takes 2 GiB to encode.
_GIB_PER_TASK = 4


class _Processes(LocalPipelineExecutor):
    """datatrove's executor with a pool that reports a killed process; its own would hang."""

    def run(self, progress: _Progress) -> None:
        """Run the incomplete tasks; end all processes as soon as one fails.

        Raises:
            LETError: a process ended early.
        """
        # Forked, so that what the parent loaded is shared.
        context = multiprocessing.get_context("fork")
        ranks, taken = self.get_incomplete_ranks(), context.Value("i", 0)
        processes = [
            context.Process(target=self._serve, args=(ranks, taken, os.getpid()))
            for _ in range(min(self.workers, len(ranks)))
        ]
        try:
            for process in processes:
                process.start()
            running: dict[Any, Any] = {process.sentinel: process for process in processes}
            while running:
                for sentinel in wait(list(running), _SECONDS_BETWEEN_LINES):
                    process = running.pop(sentinel)
                    process.join()  # its sentinel is closed a moment before its code is there
                    if code := process.exitcode:
                        raise LETError(
                            f"A worker ended with exit code {code}; -9 usually means that memory"
                            f" is full: give fewer --workers, or read {self.logging_dir.path}."
                        )
                progress.show()
        finally:
            for process in processes:
                process.terminate()
                process.join()

    def _serve(self, ranks: list[int], taken: Any, parent: int) -> None:
        """Run tasks until none is left, or the parent dies."""
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stderr = self.logging_dir.open("stderr", "a")
        while os.getppid() == parent:
            with taken.get_lock():
                number, taken.value = taken.value, taken.value + 1
            if number >= len(ranks):
                return
            self._run_for_rank(ranks[number], local_rank=1)


class _Progress:
    """Prints a line every 30 s."""

    def __init__(self, job: Job, say: Callable[[str], None]) -> None:
        self._job, self._say = job, say
        self._start = self._last = time.monotonic()
        self._begun = self._tokens()

    def show(self) -> None:
        """Print the number of complete tasks and of tokens, if it is time."""
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        done = len(list(self._job.work.glob("[0-9]*[0-9].json")))
        tokens = self._tokens()
        rate = (tokens - self._begun) / (now - self._start)
        tasks = f"{done} of {len(self._job.tasks)} tasks"
        self._say(f"{tasks}, {tokens:,} tokens, {rate:,.0f} tokens/s")

    def _tokens(self) -> int:
        num_bytes = 0
        for path in self._job.work.glob("*.bin*"):
            with contextlib.suppress(FileNotFoundError):
                num_bytes += path.stat().st_size
        return num_bytes // token_bytes(self._job.tokenizer)


def run_tasks(job: Job, say: Callable[[str], None]) -> None:
    """Run the incomplete tasks on this machine or on Ray, and wait for them.

    Raises:
        LETError: a task failed; complete shards are kept.
    """
    logger.remove()  # the one for the screen; each task writes a log
    job.failure.unlink(missing_ok=True)
    logs = str(job.work / "logs")
    options: dict[str, Any] = {"tasks": len(job.tasks), "logging_dir": logs}
    try:
        if job.options.executor == "ray":
            _run_on_ray(job, options)
        else:
            workers = job.options.workers or len(os.sched_getaffinity(0))
            _Processes([TokenizeFiles(job)], workers=workers, **options).run(_Progress(job, say))
    finally:
        if job.failure.is_file():
            # The file is empty if there was no space for the message.
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise LETError(job.failure.read_text() or str(job.explain(full)))
    missing = job.missing()
    if missing:
        raise LETError(
            f"{len(missing)} of {len(job.tasks)} tasks did not finish; read"
            f" {logs}/logs/task_{missing[0]:05d}.log and run the same command again to continue."
        )


def _run_on_ray(job: Job, options: dict[str, Any]) -> None:
    try:
        import ray
    except ImportError as error:
        raise LETError("--executor ray needs the package ray; install it with pip.") from error
    # Uses RAY_ADDRESS or a running cluster of this machine, or else starts one.
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # a cluster that does not answer raises several types
        raise LETError(f"Ray did not start ({first_line(error)}); check RAY_ADDRESS.") from error
    try:
        # Ray does not enforce memory; a larger request would never start on a small machine.
        RayPipelineExecutor(
            [TokenizeFiles(job)], workers=job.options.workers or -1, mem_per_cpu_gb=1, **options
        ).run()
    finally:
        ray.shutdown()


def queued_on_slurm(job: Job) -> str:
    """Return the numbers of this data's jobs in Slurm's queue, empty if there are none.

    Raises:
        LETError: Slurm is missing or does not answer.
    """
    names = f"{_job_name(job)},{_job_name(job)}-merge"
    numbers = _call("squeue", "--noheader", "--format=%F", f"--name={names}").split()
    return ", ".join(sorted(set(numbers)))


def submit_to_slurm(job: Job) -> str:
    """Submit an array of the incomplete tasks, and a job that merges after it.

    Partition, account and other options are sbatch's variables (SBATCH_PARTITION), from the site
    file of launch/ or from the environment.

    Returns:
        A sentence that names the jobs.

    Raises:
        LETError: Slurm is missing or refuses the job, or no partition is given.
    """
    logger.remove()
    os.environ.update(_site_variables())
    name = _job_name(job)
    tokenize = _slurm(
        job, TokenizeFiles(job), len(job.tasks), name, workers=job.options.workers or -1
    )
    merge = _slurm(job, _MergeShards(job), 1, f"{name}-merge", depends=tokenize)
    try:
        merge.run()
    except subprocess.CalledProcessError as error:
        raise LETError("sbatch refused the job; correct the SBATCH_ variables.") from error
    return (
        f"submitted: job {tokenize.job_id} tokenizes, job {merge.job_id} merges after it; repeat"
        f" the command to continue after a failure; logs are in {job.work}"
    )


def _job_name(job: Job) -> str:
    return "data-" + hashlib.sha256(str(job.work).encode()).hexdigest()[:12]


def _call(*command: str) -> str:
    try:
        return subprocess.check_output(command, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LETError(
            f"--executor slurm cannot call {command[0]} ({error}); run it on a login node."
        ) from error


def _slurm(
    job: Job, step: PipelineStep, tasks: int, name: str, **options: Any
) -> SlurmPipelineExecutor:
    partition = os.environ.get("SBATCH_PARTITION")
    if not partition:
        raise LETError(f"SBATCH_PARTITION is not set; set it in {_SITE} or in the environment.")
    return _Slurm(
        [step],
        tasks,
        partition=partition,
        time=os.environ.get("SBATCH_TIMELIMIT", "24:00:00"),
        mem_per_cpu_gb=_GIB_PER_TASK,
        job_name=name,
        qos=None,
        env_command=f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH",
        # Without it, a merge whose tasks failed would wait indefinitely.
        sbatch_args={"kill-on-invalid-dep": "yes"},
        logging_dir=str(job.work / name),
        skip_completed=not name.endswith("-merge"),
        **options,
    )


class _MergeShards(PipelineStep):
    """datatrove's step that ends a job, for a cluster's executor."""

    name = "Megatron data sets"
    type = "MERGER"

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Merge the shards."""
        # It imports torch.
        from megatron_let.preprocessing.merge import merge

        merge(self.job)
        yield from ()


class _Slurm(SlurmPipelineExecutor):
    def launch_merge_stats(self) -> None:
        """Submit no third job for datatrove's statistics."""


def _site_variables() -> dict[str, str]:
    """Return the variables of sbatch that the site file sets."""
    site = Path(os.environ.get("LET_SITE", _SITE))
    if not site.is_file():
        return {}
    script = 'set -a; . "$1" >&2; env -0'
    output = _call("bash", "-c", script, "bash", str(site))
    pairs = (line.partition("=") for line in output.split("\0"))
    return {name: value for name, _, value in pairs if name.startswith("SBATCH_")}
