"""Train one run of a sweep on this machine, in child processes, and show its progress."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_let.cli.common import say
from megatron_let.errors import LETError
from megatron_let.files.names import METRICS
from megatron_let.metrics.read import RunMetrics, load_metrics
from megatron_let.metrics.sweep import SweepRun

_CHECKOUT = Path(__file__).resolve().parents[2]
# Where runs/ and launch/ are: the checkout, or the current folder of an installed package.
ROOT = _CHECKOUT if (_CHECKOUT / "launch").is_dir() else Path.cwd()
_POLL_SECONDS = 0.5


def run_environment(data: Path, teacher: Path) -> dict[str, str]:
    """Return the environment of a run: the recipes' variables, all cores, and no network."""
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    variables = {"DATA": str(data), "TEACHER": str(teacher)}
    # All files are local by now; transformers must not look for a network.
    return {**threads, **os.environ, **variables, "HF_HUB_OFFLINE": "1"}


def train_locally(
    run: SweepRun,
    output: Path,
    environment: Mapping[str, str],
    console: Console,
    nproc_per_node: int = 1,
) -> None:
    """Train a run, unless its metrics end with the evaluation of its last step.

    Args:
        run: the run to train.
        output: folder of its checkpoints, metrics.jsonl and train.log, to which its output goes.
        environment: result of `run_environment`.
        console: shows progress and time left.
        nproc_per_node: number of ranks.

    Raises:
        LETError: the run failed; the message has its first error line.
    """
    metrics, log = output / METRICS, output / "train.log"
    done = load_metrics(metrics)
    if done.last_step >= run.num_steps and run.num_steps in done.valid_loss:
        say(console, f"      {run.variant}: already done")
        return
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(nproc_per_node),
        "-m", "megatron_let.pretrain", "--config", str(run.recipe),
        "--let-metrics-path", str(metrics), *run.flags,
    ]  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    before = log.stat().st_size if log.exists() else 0
    with log.open("a") as stream, _progress(console) as progress:
        process = subprocess.Popen(
            command,
            env={**environment, "OUTPUT": str(output)},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            _follow(process, progress, run, metrics)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        raise LETError(
            f"The {run.variant} run failed: {_first_error(log, before)} (full log: {log})"
        )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("      {task.description:<8}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[status]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _follow(
    process: subprocess.Popen[bytes], progress: Progress, run: SweepRun, path: Path
) -> None:
    steps = run.num_steps
    task = progress.add_task(run.variant, total=steps, status="starting")
    printed = 0
    while process.poll() is None:
        time.sleep(_POLL_SECONDS)
        metrics = load_metrics(path)
        if not metrics.steps:
            continue
        step, status = metrics.last_step, _status(metrics)
        progress.update(task, completed=step, status=status)
        # A log file has no moving bar: print the first step and every tenth of the run.
        if not progress.console.is_terminal and step >= printed:
            say(progress.console, f"      {run.variant} step {step}/{steps} {status}")
            printed = (step * 10 // steps + 1) * steps // 10


def _status(metrics: RunMetrics) -> str:
    row = metrics.steps[metrics.last_step]
    parts = [f"loss {row['lm_loss']:.3f}"]
    if metrics.final_valid_loss is not None:
        parts.append(f"held-out {metrics.final_valid_loss:.3f}")
    if "let_cosine" in row:
        parts.append(f"cosine {row['let_cosine']:.3f}")
    return " ".join([*parts, f"{row['tokens_per_second']:.0f} tokens/s"])


def _first_error(log: Path, offset: int) -> str:
    """Return the first line after `offset` bytes that names an error, else the last line."""
    lines = log.read_bytes()[offset:].decode(errors="replace").splitlines()
    errors = [line for line in lines if "megatron_let: error" in line or "Error:" in line]
    return errors[0].strip() if errors else (lines or ["it printed nothing"])[-1]
