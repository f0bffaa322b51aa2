"""Show the state of a run of launch/: progress, speed, time left, checkpoint and restarts."""

import argparse
import datetime
import os
import shlex
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_let.config.recipes import RecipeError, load_recipe, value_of
from megatron_let.files.names import DONE, METRICS, SAVE_NOW, STOP, TRACKER
from megatron_let.metrics.read import load_metrics

# Enough steps for a stable median, few enough to show the present speed.
_RECENT_STEPS = 20


def num_steps(run: Path) -> int | None:
    """Return `--train-iters` of the last attempt, from its command line or else its recipe."""
    records = sorted((run / "attempts").glob("[0-9]*"))
    if not records:
        return None
    command = records[-1] / "command.txt"
    words = shlex.split(command.read_text()) if command.exists() else []
    given = value_of("--train-iters", words)
    if given is not None:
        return int(given)
    try:
        return int(load_recipe(records[-1] / "recipe.yaml")["train-iters"])
    except (RecipeError, KeyError):
        return None


def checkpoint(run: Path) -> tuple[int, float] | None:
    """Return iteration and age in seconds of the last complete checkpoint."""
    tracker = run / "checkpoints" / TRACKER
    content = tracker.read_text().strip() if tracker.exists() else ""
    return (int(content), time.time() - tracker.stat().st_mtime) if content.isdigit() else None


def state(run: Path) -> str:
    """Return the state of the run's jobs, which have its name, in a few words."""
    checkpoints = run / "checkpoints"
    if (checkpoints / DONE).exists():
        return "done"
    stopping = " (asked to stop)" if (checkpoints / STOP).exists() else ""
    try:
        owner = (run / "attempts.tsv").stat().st_uid
        # The folder, or LET_RUNS/NAME, may be a link.
        names = ",".join({Path(os.path.abspath(run)).name, run.resolve().name})
        query = ["squeue", "--noheader", f"--user={owner}", f"--name={names}", "--format=%T"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except OSError:
        return f"unknown, no squeue here{stopping}"
    except subprocess.TimeoutExpired:
        return f"unknown, squeue does not answer{stopping}"
    if answer.returncode:
        return f"unknown, squeue failed ({' '.join(answer.stderr.split())}){stopping}"
    return f"{', '.join(answer.stdout.lower().split()) or 'not queued'}{stopping}"


def progress(run: Path) -> Iterator[tuple[str, str]]:
    """Yield step, loss, speed and time left."""
    metrics, total = load_metrics(run / METRICS), num_steps(run)
    step = metrics.last_step
    yield "step", f"{step} of {total} ({100 * step / total:.1f} %)" if total else str(step)
    if step:
        recent = [metrics.steps[step] for step in sorted(metrics.steps)[-_RECENT_STEPS:]]
        tokens = statistics.median(row["tokens_per_second"] for row in recent)
        seconds = statistics.median(row["step_seconds"] for row in recent)
        yield "loss", f"{metrics.steps[step]['lm_loss']:.4f}"
        yield "speed", f"{tokens:,.0f} tokens/s, {seconds:.2f} s per step"
        left = _duration((total - step) * seconds) if total else "unknown"
        yield "time left", f"{left} of training"


def rows(run: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and text of each line to print."""
    lines = (run / "attempts.tsv").read_text().splitlines()
    _, job, _, _, nodes = lines[-1].split("\t")
    yield "state", state(run)
    yield from progress(run)
    last = checkpoint(run)
    yield "checkpoint", f"step {last[0]}, {_duration(last[1])} ago" if last else "none"
    yield "attempts", f"{len(lines)}, the last as job {job} on {nodes}"
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
    """Print the state; return the exit code: 2 if the folder is not a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder, LET_RUNS/NAME")
    run = parser.parse_args(argv).run
    if not (run / "attempts.tsv").exists():
        print(f"{run} is not a run of launch/; give the folder LET_RUNS/NAME.")
        return 2
    for name, text in rows(run):
        print(f"{name:<11} {text}")
    return 0
