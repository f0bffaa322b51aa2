"""Train runs of a sweep on this machine, in child processes, and show their progress."""

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn

from megatron_let.cli.common import say
from megatron_let.errors import LETError
from megatron_let.files.atomic import write_json
from megatron_let.files.names import METRICS, TRACKER
from megatron_let.metrics.read import RunMetrics, load_metrics
from megatron_let.metrics.sweep import SweepRun
from megatron_let.run.output_folder import data_id, teacher_id

_CHECKOUT = Path(__file__).resolve().parents[2]
# Where runs/ and launch/ are: the checkout, or the current folder of an installed package.
ROOT = _CHECKOUT if (_CHECKOUT / "launch").is_dir() else Path.cwd()
LOG = "train.log"
_SETTINGS = "settings.json"
# Settings, by how their names begin, that may change when a run continues.
_MAY_CHANGE = (
    "context-parallel-size", "ckpt-", "distributed-", "exit-", "let-max-prefetch",
    "let-placement", "let-teacher-compile", "log-", "micro-batch-size", "num-workers", "overlap-",
    "pipeline-model-parallel-size", "recompute-", "save", "sequence-parallel", "tensorboard-",
    "tensor-model-parallel-size", "timing-", "use-distributed-optimizer", "wandb-",
)  # fmt: skip
_DATA_PATHS = {"data-path", "train-data-path", "valid-data-path", "test-data-path"}
_POLL_SECONDS = 1.0
# Recent steps whose median time predicts the time left.
_RECENT_STEPS = 20


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first SIGINT or SIGTERM, and ignore those after it."""

    def interrupt(*_: object) -> None:
        # A second one must not interrupt the end of the child processes.
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    # A shell starts background commands with SIGINT ignored.
    before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_environment(data: Path, teacher: Path, processes: int = 1) -> dict[str, str]:
    """Return the environment of one of the processes that share the cores.

    It has the recipes' variables: folders of the indexed data, and of teacher and tokenizer.
    """
    cores = max(1, len(os.sched_getaffinity(0)) // processes)
    variables = {"DATA": str(data), "TEACHER": str(teacher)}
    # All files are local by now; transformers must not look for a network.
    return {"OMP_NUM_THREADS": str(cores), **os.environ, **variables, "HF_HUB_OFFLINE": "1"}


class Child(subprocess.Popen[bytes]):
    """A child process whose output is appended to a log file."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        """Start the command; an error message names it by `name`."""
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as stream:
            self._start = self._shown = stream.tell()
            # In a session of its own, so that Ctrl-C reaches this process alone, which ends it.
            super().__init__(
                command, env=environment, stdout=stream, stderr=stream, start_new_session=True
            )

    def show(self, console: Console) -> None:
        """Print the output since the last call."""
        new = self.log.read_bytes()[self._shown :]
        self._shown += len(new)
        say(console, new.decode(errors="replace"), end="")

    def check(self) -> None:
        """Raise a LETError that names the first error line and the log if the process failed."""
        if self.wait() != 0:
            error = self._first_error()
            raise LETError(f"The {self.name} run failed: {error} (full log: {self.log})")

    def _first_error(self) -> str:
        """Return the first line that names an error, else the last line."""
        text = self.log.read_bytes()[self._start :].decode(errors="replace")
        lines = text.splitlines()
        errors = [line for line in lines if ": error" in line or "Error:" in line]
        return errors[0].strip() if errors else (lines or ["it printed nothing"])[-1]

    def terminate(self) -> None:
        """Ask the process and its workers to end; torchrun ends its ranks, of other sessions."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGTERM)


def run_command_line(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    verbose: Console | None,
) -> None:
    """Run a command to its end, with its output in `log`, and on `verbose` if given.

    Raises:
        LETError: the command failed.
    """
    child = Child(name, command, environment, log)
    try:
        while child.poll() is None:
            time.sleep(_POLL_SECONDS / 10)
            if verbose is not None:
                child.show(verbose)
    finally:
        child.terminate()
        child.wait()
    child.check()


def run_subcommand(words: Sequence[str | Path], log: Path, verbose: Console | None) -> None:
    """Run a subcommand of `megatron-let` offline, like `run_command_line`."""
    command = [sys.executable, "-m", "megatron_let.cli", *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run_command_line(str(words[0]), command, environment, log, verbose)


def _portable(value: Any, folder: Path) -> Any:
    """Return a setting as it is elsewhere too: a path beside the run's `folder` is relative."""
    if isinstance(value, list):
        return [_portable(item, folder) for item in value]
    if isinstance(value, str) and Path(value).is_relative_to(folder.parents[1]):
        return os.path.relpath(value, folder)
    return plain(value)


def plain(value: Any) -> Any:
    """Return a setting's value without the way it is written: 0.001 for 1e-3 of a flag."""
    # A switch is given by its name only.
    if isinstance(value, bool):
        return "" if value else value
    if isinstance(value, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    return value


def _is_same(theirs: Any, ours: Any) -> bool:
    if "#" in str(theirs) and "#" not in str(ours):
        # A teacher that is yet to be trained again has a name and no digest.
        return str(theirs).partition("#")[0] == ours
    return bool(theirs == ours)


def export(run: Path, folder: Path, log: Path, verbose: Console | None) -> None:
    """Convert a run's last checkpoint to a Hugging Face folder, unless that is newer."""
    made, checkpoint = folder / "config.json", run / "checkpoints" / TRACKER
    if made.is_file() and not (
        checkpoint.is_file() and checkpoint.stat().st_mtime > made.stat().st_mtime
    ):
        return
    conversion = ("convert", "megatron-to-hf", "--input", run / "checkpoints", "--force")
    run_subcommand((*conversion, "--output", folder), log, verbose)


@dataclass
class Trainer:
    """Trains runs on this machine, `jobs` at a time, in the environment of `run_environment`.

    The console shows progress and time left; with `verbose`, also the runs' output.
    """

    environment: Mapping[str, str]
    console: Console
    jobs: int = 1
    nproc_per_node: int = 1
    verbose: bool = False
    _running: dict[TaskID, tuple[SweepRun, Child]] = field(default_factory=dict, init=False)

    def train(self, runs: Mapping[Path, SweepRun]) -> dict[str, str]:
        """Train {output folder: run}, but for runs whose last step is evaluated.

        A folder gets the checkpoints, metrics.jsonl and train.log of its run.

        Returns:
            The message of each run that failed, by its name; the others were still trained.

        Raises:
            LETError: a folder has a run of other settings.
        """
        self.check(runs)
        waiting = dict(runs)
        one_seed = len({run.seed for run in runs.values()}) == 1
        failed: dict[str, str] = {}
        with _progress(self.console) as progress:
            try:
                while waiting or self._running:
                    while waiting and len(self._running) < self.jobs:
                        folder = next(iter(waiting))
                        run = waiting.pop(folder)
                        self._begin(folder, run, run.variant if one_seed else run.name, progress)
                    time.sleep(_POLL_SECONDS)
                    for task in list(self._running):
                        failed |= self._follow(task, progress)
            finally:
                for _, child in self._running.values():
                    child.terminate()
                for _, child in self._running.values():
                    child.wait()
        return failed

    def check(self, runs: Mapping[Path, SweepRun]) -> None:
        """Check, before any training, that no folder has steps of a run with other settings.

        Raises:
            LETError: names the folder and the first setting that differs.
        """
        for folder, run in runs.items():
            self._check_same(folder, run)

    def record(self, folder: Path, run: SweepRun) -> None:
        """Write what determines the run that begins in `folder`."""
        write_json(folder / _SETTINGS, self._settings(folder, run))

    def _check_same(self, folder: Path, run: SweepRun) -> None:
        if not (folder / _SETTINGS).is_file() or not load_metrics(folder / METRICS).last_step:
            return
        theirs, ours = json.loads((folder / _SETTINGS).read_text()), self._settings(folder, run)
        for name in theirs | ours:
            if not _is_same(theirs.get(name), ours.get(name)):
                raise LETError(
                    f"{folder} holds another run: {name} is {theirs.get(name)} there and"
                    f" {ours.get(name)} here; give another --output."
                )

    def _settings(self, folder: Path, run: SweepRun) -> dict[str, Any]:
        """Return what determines a run: it is the same wherever the data and the output are."""
        settings = run.settings
        kept = [name for name in settings if not name.removeprefix("no-").startswith(_MAY_CHANGE)]
        values = {name: _portable(settings[name], folder.absolute()) for name in kept}
        if "let-teacher" in values:
            values["let-teacher"] = teacher_id(settings["let-teacher"])
        for name in _DATA_PATHS & values.keys():
            given = settings[name]
            words = given if isinstance(given, list) else str(given).split()
            paths = (str(word).replace("${DATA}", self.environment["DATA"]) for word in words)
            values[name] = [data_id(path) for path in paths]
        return values | {"TEACHER": teacher_id(self.environment["TEACHER"])}

    def _begin(self, folder: Path, run: SweepRun, label: str, progress: Progress) -> None:
        metrics = folder / METRICS
        done = load_metrics(metrics)
        if done.last_step >= run.num_steps and run.num_steps in done.valid_loss:
            say(self.console, f"      {label}: already done")
            return
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(self.nproc_per_node),
            "-m", "megatron_let.pretrain", "--config", str(run.recipe),
            "--let-metrics-path", str(metrics), *run.flags,
        ]  # fmt: skip
        task = progress.add_task(
            label, total=run.num_steps, completed=done.last_step, status="starting", printed=2
        )
        self.record(folder, run)
        environment = {**self.environment, "OUTPUT": str(folder)}
        self._running[task] = run, Child(run.variant, command, environment, folder / LOG)

    def _follow(self, task: TaskID, progress: Progress) -> dict[str, str]:
        """Show a run's progress; return its message if it failed."""
        run, child = self._running[task]
        # Before the metrics are read, so that the last step is shown.
        ended = child.poll() is not None
        if self.verbose:
            child.show(self.console)
        metrics = load_metrics(child.log.with_name(METRICS))
        # The first step allocates memory and loads the teacher, and would mispredict the rest.
        if metrics.last_step > 1:
            self._show(progress.tasks[task], metrics, progress)
        if not ended:
            return {}
        del self._running[task]
        try:
            child.check()
        except LETError as error:
            say(self.console, f"      {error}", "red")
            return {run.name: str(error)}
        return {}

    def _show(self, task: Task, metrics: RunMetrics, progress: Progress) -> None:
        steps, step = int(task.total or 0), metrics.last_step
        status = _status(metrics, steps)
        progress.update(task.id, completed=step, status=status)
        # The second step and every tenth of the run.
        if not self.console.is_terminal and step >= task.fields["printed"]:
            say(self.console, f"      {task.description} step {step}/{steps} {status}")
            progress.update(task.id, printed=next_line(step, steps))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("      {task.description:<8}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[status]}"),
        console=console,
        # A log file has no moving bar; it gets lines instead.
        disable=not console.is_terminal,
    )


def next_line(step: int, steps: int) -> int:
    """Return the first step after `step` in another tenth of the run."""
    return math.ceil((step * 10 // steps + 1) * steps / 10)


def _status(metrics: RunMetrics, steps: int) -> str:
    row = metrics.steps[metrics.last_step]
    parts = [f"loss {row['lm_loss']:.3f}"]
    if metrics.final_valid_loss is not None:
        parts.append(f"held-out {metrics.final_valid_loss:.3f}")
    if "let_cosine" in row:
        parts.append(f"cosine {row['let_cosine']:.3f}")
    seconds = statistics.median(metrics.step_seconds()[-_RECENT_STEPS:])
    minutes, left = divmod(round((steps - metrics.last_step) * seconds), 60)
    return " ".join([*parts, f"{row['tokens_per_second']:.0f} tokens/s {minutes}:{left:02} left"])
