"""One training run on this machine, in processes of its own, followed through its metrics file."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_let.errors import LETError
from megatron_let.metrics.read import RunMetrics, load_metrics

_POLL_SECONDS = 0.5


def train_locally(
    name: str,
    command: list[str],
    environment: Mapping[str, str],
    output: Path,
    num_steps: int,
    console: Console,
) -> None:
    """Run a command that writes `output`/metrics.jsonl, showing progress and time left.

    Its own output is appended to `output`/train.log. A run whose metrics end with the evaluation
    of its last step is not run again.

    Raises:
        LETError: the command failed; with its first error line.
    """
    metrics, log = output / "metrics.jsonl", output / "train.log"
    done = load_metrics(metrics)
    if done.last_step >= num_steps and num_steps in done.valid_loss:
        console.print(f"      {name}: already done")
        return
    output.mkdir(parents=True, exist_ok=True)
    before = log.stat().st_size if log.exists() else 0
    with log.open("a") as stream, _progress(console) as progress:
        process = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            _follow(process, progress, name, metrics, num_steps)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        raise LETError(f"The {name} run failed: {_first_error(log, before)} (all of it: {log})")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("      {task.description:<8}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[status]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _follow(
    process: subprocess.Popen[bytes], progress: Progress, name: str, metrics: Path, steps: int
) -> None:
    task = progress.add_task(name, total=steps, status="starting")
    printed = 0
    while process.poll() is None:
        time.sleep(_POLL_SECONDS)
        run = load_metrics(metrics)
        if not run.steps:
            continue
        status = _status(run)
        progress.update(task, completed=run.last_step, status=status)
        # A log has no bar that moves: say something at the first step and at each tenth.
        if not progress.console.is_terminal and run.last_step >= printed:
            progress.console.print(f"      {name} step {run.last_step}/{steps} {status}")
            printed = (run.last_step * 10 // steps + 1) * steps // 10


def _status(run: RunMetrics) -> str:
    row = run.steps[run.last_step]
    parts = [f"loss {row['lm_loss']:.3f}"]
    if run.final_valid_loss is not None:
        parts.append(f"held-out {run.final_valid_loss:.3f}")
    if "let_cosine" in row:
        parts.append(f"cosine {row['let_cosine']:.3f}")
    return " ".join([*parts, f"{row['tokens_per_second']:.0f} tokens/s"])


def _first_error(log: Path, offset: int) -> str:
    """The first line that names an error, of what was written after `offset` bytes."""
    lines = log.read_bytes()[offset:].decode(errors="replace").splitlines()
    errors = [line for line in lines if "megatron_let: error" in line or "Error:" in line]
    return errors[0].strip() if errors else (lines or ["it printed nothing"])[-1]
