"""Runs held against a baseline: what each reached, when, at what cost, and whether it is fair."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_let.errors import LETError
from megatron_let.metrics.head_to_head import aligned_phase_cost, steps_to_reach
from megatron_let.metrics.read import RunMetrics, load_metrics
from megatron_let.run.output_folder import read_settings

_METRICS = "metrics.jsonl"
_CHECKPOINTS = "checkpoints"
_EVALUATION = "evaluation/results.json"

Curve = dict[int, float]


@dataclass(frozen=True)
class ComparedRun:
    """One run's metrics, with what its folder says of it.

    Attributes:
        name: of the line that it is drawn on; runs of one name differ in the seed.
        path: its folder or metrics file.
        metrics: see there.
        settings: by argument name; None where the folder does not say.
        downstream: average accuracy in percent, of the last checkpoint that was evaluated.
    """

    name: str
    path: Path
    metrics: RunMetrics
    settings: dict[str, Any] | None = None
    downstream: float | None = None

    @property
    def method(self) -> str | None:
        """`none` for a baseline."""
        return None if self.settings is None else self.settings.get("let_method")

    def elapsed(self, amount: Callable[[dict[str, Any]], float]) -> Curve:
        """Sum of an amount over the steps up to each; a lost and retaken step counts once."""
        steps = sorted(self.metrics.steps)
        amounts = accumulate(amount(self.metrics.steps[step]) for step in steps)
        return dict(zip(steps, amounts, strict=True))

    def seconds(self) -> Curve:
        """Training time up to each step, without evaluations and checkpoints."""
        return self.elapsed(lambda row: row["step_seconds"])

    def tokens(self) -> Curve:
        """Tokens trained on up to each step."""
        return self.elapsed(lambda row: row["tokens_per_second"] * row["step_seconds"])

    @property
    def peak_memory_bytes(self) -> int | None:
        """Of the rank that writes the metrics."""
        sizes = [row["max_memory_bytes"] for row in self.metrics.steps.values()]
        return max(sizes, default=None)

    @property
    def unfinished(self) -> str | None:
        """What is missing of the run, or None."""
        wanted = (self.settings or {}).get("train_iters")
        if not self.metrics.steps:
            return "no step was taken"
        if wanted is not None and self.metrics.last_step < wanted:
            return f"{self.metrics.last_step} of {wanted} steps"
        return None


def load_run(name: str, path: Path) -> ComparedRun:
    """Read a run's folder, or a metrics file alone.

    Raises:
        LETError: there is no metrics file.
    """
    metrics = path / _METRICS if path.is_dir() else path
    if not metrics.is_file():
        raise LETError(
            f"The run {path} has no {metrics.name}; give a folder that a run with"
            " --let-metrics-path wrote to, or the file itself."
        )
    folder = metrics.parent
    settings = read_settings(folder / _CHECKPOINTS)
    return ComparedRun(name, path, load_metrics(metrics), settings, _downstream(folder))


def _downstream(folder: Path) -> float | None:
    """Average of the evaluated checkpoint that saw most tokens."""
    if not (folder / _EVALUATION).is_file():
        return None
    models = json.loads((folder / _EVALUATION).read_text())["models"]
    latest = max(models, key=lambda model: model["tokens"] or 0, default=None)
    return None if latest is None else float(latest["average"])


def find_baseline(runs: list[ComparedRun], name: str | None) -> str:
    """Name of what the others are held against.

    Args:
        name: asked for; None takes the only one whose runs had no teacher.

    Raises:
        LETError: there is none of that name, or not exactly one without a teacher.
    """
    names = list(dict.fromkeys(run.name for run in runs))
    if name is not None:
        if name not in names:
            raise LETError(f"--baseline is {name} but the runs are {', '.join(names)}.")
        return name
    found = list(dict.fromkeys(run.name for run in runs if run.method == "none"))
    if len(found) != 1:
        what = "none" if not found else ", ".join(found)
        raise LETError(
            f"Of the runs {', '.join(names)} those without a teacher are: {what}; say which is"
            " the baseline by --baseline NAME."
        )
    return found[0]


@dataclass(frozen=True)
class Spread:
    """Mean, smallest and largest of one figure over seeds."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Of those that there are; None if there are none."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known:
            return None
        return cls(statistics.fmean(known), min(known), max(known), len(known))


@dataclass(frozen=True)
class Line:
    """All runs of one name, and their figures.

    Attributes:
        steps_to_target, seconds_to_target: until the held-out loss was the baseline's last of the
            same seed; None where it never was.
        num_reached: how many of the runs reached it.
        notes: what a reader must know.
    """

    name: str
    runs: list[ComparedRun]
    final_loss: Spread | None
    steps_to_target: Spread | None
    seconds_to_target: Spread | None
    speed_up: Spread | None
    time_speed_up: Spread | None
    num_reached: int
    tokens_per_second: Spread | None
    teacher_step_cost: Spread | None
    peak_memory_bytes: Spread | None
    downstream: Spread | None
    notes: list[str] = field(default_factory=list)


def compare(runs: list[ComparedRun], baseline: str) -> list[Line]:
    """One line a name, the baseline's first.

    Args:
        runs: in the order to show.
        baseline: a name among them.
    """
    by_name: dict[str, list[ComparedRun]] = {}
    for run in sorted(runs, key=lambda run: run.name != baseline):
        by_name.setdefault(run.name, []).append(run)
    return [_line(name, members, by_name[baseline]) for name, members in by_name.items()]


def _line(name: str, runs: list[ComparedRun], baselines: list[ComparedRun]) -> Line:
    pairs = [(run, _partner(run, baselines)) for run in runs]
    steps = [_steps(run, partner) for run, partner in pairs]
    seconds = [_at(run.seconds(), step) for (run, _), step in zip(pairs, steps, strict=True)]
    base_steps = [_last_evaluation(partner) for _, partner in pairs]
    base_seconds = [
        _at(partner.seconds(), step) for (_, partner), step in zip(pairs, base_steps, strict=True)
    ]
    return Line(
        name=name,
        runs=runs,
        final_loss=Spread.of(run.metrics.final_valid_loss for run in runs),
        steps_to_target=Spread.of(steps),
        seconds_to_target=Spread.of(seconds),
        speed_up=Spread.of(map(_ratio, base_steps, steps)),
        time_speed_up=Spread.of(map(_ratio, base_seconds, seconds)),
        num_reached=sum(step is not None for step in steps),
        tokens_per_second=Spread.of(_rate(run) for run in runs),
        teacher_step_cost=Spread.of(aligned_phase_cost(run.metrics) for run in runs),
        peak_memory_bytes=Spread.of(run.peak_memory_bytes for run in runs),
        downstream=Spread.of(run.downstream for run in runs),
        notes=[note for run, partner in pairs for note in _notes(run, partner)],
    )


def _seed(run: ComparedRun) -> Any:
    return (run.settings or {}).get("seed")


def _partner(run: ComparedRun, baselines: list[ComparedRun]) -> ComparedRun:
    """The baseline of the same seed, else the first."""
    return next((b for b in baselines if _seed(b) == _seed(run)), baselines[0])


def _last_evaluation(run: ComparedRun) -> float | None:
    return max(run.metrics.valid_loss, default=None)


def _steps(run: ComparedRun, baseline: ComparedRun) -> float | None:
    target = baseline.metrics.final_valid_loss
    return None if target is None else steps_to_reach(run.metrics.valid_loss, target)


def _at(curve: Curve, step: float | None) -> float | None:
    """Value of a running sum at a step between two; None where the run has not been there."""
    if step is None or not curve or step > max(curve):
        return None
    below, above = math.floor(step), math.ceil(step)
    low, high = curve.get(below, 0.0), curve.get(above)
    return None if high is None else low + (step - below) * (high - low)


def _ratio(base: float | None, ours: float | None) -> float | None:
    return base / ours if base and ours else None


def _rate(run: ComparedRun) -> float | None:
    rows = [row["tokens_per_second"] for step, row in run.metrics.steps.items() if step > 1]
    return statistics.median(rows) if rows else None


def _notes(run: ComparedRun, baseline: ComparedRun) -> list[str]:
    notes = []
    if run.unfinished:
        notes.append(f"{run.path.name}: unfinished, {run.unfinished}")
    if not run.metrics.valid_loss:
        notes.append(f"{run.path.name}: never evaluated")
    if run is not baseline:
        notes += [f"{run.path.name}: {text}" for text in differences(run, baseline)]
    return notes


def differences(run: ComparedRun, baseline: ComparedRun) -> list[str]:
    """In what two runs differ besides the method, a phrase each."""
    if run.settings is None or baseline.settings is None:
        return ["its settings are not known, so neither whether the comparison is fair"]
    names = [n for n in run.settings | baseline.settings if not n.startswith("let_")]
    return [
        f"{name} is {run.settings.get(name)}, the baseline's {baseline.settings.get(name)}"
        for name in names
        if run.settings.get(name) != baseline.settings.get(name)
    ]
