#!/usr/bin/env python
"""How a run of launch/ stands: progress, speed, time left, checkpoint, restarts, what to do."""

from __future__ import annotations

import argparse
import datetime
import itertools
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_let.config.recipes import RecipeError, load_recipe
from megatron_let.files.names import DONE, SAVE_NOW, STOP, TRACKER
from megatron_let.metrics.read import RunMetrics, load_metrics

# Enough steps to be steady, few enough to be of now.
_RECENT_STEPS = 20


def num_steps(run: Path) -> int | None:
    """`--train-iters` of the last attempt: of its command line, else of its recipe."""
    records = sorted((run / "attempts").glob("[0-9]*"))
    if not records:
        return None
    command = records[-1] / "command.txt"
    words = shlex.split(command.read_text()) if command.exists() else []
    for word, value in itertools.pairwise(words):
        if word == "--train-iters":
            return int(value)
    try:
        return int(load_recipe(records[-1] / "recipe.yaml")["train-iters"])
    except (RecipeError, KeyError):
        return None


def checkpoint(run: Path) -> tuple[int, float] | None:
    """Iteration and age in seconds of the last complete checkpoint."""
    tracker = run / "checkpoints" / TRACKER
    content = tracker.read_text().strip() if tracker.exists() else ""
    return (int(content), time.time() - tracker.stat().st_mtime) if content.isdigit() else None


def attempts(run: Path) -> list[list[str]]:
    """Rows of attempts.tsv: number, job, first iteration, time, nodes."""
    return [line.split("\t") for line in (run / "attempts.tsv").read_text().splitlines()]


def state(run: Path, job: str) -> str:
    """One word or two about the run."""
    checkpoints = run / "checkpoints"
    if (checkpoints / DONE).exists():
        return "done"
    stopping = " (asked to stop)" if (checkpoints / STOP).exists() else ""
    try:
        query = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return f"unknown, no squeue here{stopping}"
    return f"{answer.stdout.strip().lower() or 'not queued'}{stopping}"


def speed(metrics: RunMetrics) -> tuple[float, float] | None:
    """Median tokens/s and seconds a step of the last steps."""
    recent = [metrics.steps[step] for step in sorted(metrics.steps)[-_RECENT_STEPS:]]
    if not recent:
        return None
    tokens = statistics.median(step["tokens_per_second"] for step in recent)
    return tokens, statistics.median(step["step_seconds"] for step in recent)


def progress(run: Path) -> Iterator[tuple[str, str]]:
    """How far training is, how fast, and how long it will take."""
    metrics, total = load_metrics(run / "metrics.jsonl"), num_steps(run)
    step = metrics.last_step
    yield "step", f"{step} of {total} ({100 * step / total:.1f} %)" if total else str(step)
    if step:
        yield "loss", f"{metrics.steps[step]['lm_loss']:.4f}"
    recent = speed(metrics)
    if recent:
        yield "speed", f"{recent[0]:,.0f} tokens/s, {recent[1]:.2f} s a step"
        left = _duration((total - step) * recent[1]) if total else "unknown"
        yield "time left", f"{left} of training"


def rows(run: Path) -> Iterator[tuple[str, str]]:
    """What is printed, line by line."""
    tries = attempts(run)
    yield "state", state(run, tries[-1][1])
    yield from progress(run)
    last = checkpoint(run)
    yield "checkpoint", f"step {last[0]}, {_duration(last[1])} ago" if last else "none"
    yield "attempts", f"{len(tries)}, the last as job {tries[-1][1]} on {tries[-1][4]}"
    yield "last end", _last_end(run)
    yield "stop, save", f"touch {run}/checkpoints/{STOP} or {SAVE_NOW}"
    if list(run.glob("wandb/offline-run-*")):
        yield "wandb", f"wandb sync {run}/wandb/offline-run-*"


def _last_end(run: Path) -> str:
    results = sorted((run / "attempts").glob("*/result.tsv"))
    if not results or not results[-1].read_text().strip():
        return "none yet"
    _, code, rank, iteration = results[-1].read_text().split()
    who = "" if rank == "-" else f" of rank {rank}"
    return f"attempt {int(results[-1].parent.name)} with code {code}{who}, saved step {iteration}"


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def main(argv: list[str] | None = None) -> int:
    """Print the lines; 2 if the folder is no run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder, LET_RUNS/NAME")
    run = parser.parse_args(argv).run
    if not (run / "attempts.tsv").exists():
        print(f"{run} is no run of launch/: give the folder LET_RUNS/NAME.")
        return 2
    for name, text in rows(run):
        print(f"{name:<11} {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
