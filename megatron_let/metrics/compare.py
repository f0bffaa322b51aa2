"""Compare runs with a baseline: losses, speed-up, cost, and whether the settings match."""

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np

from megatron_let.errors import LETError
from megatron_let.files.names import METRICS
from megatron_let.metrics.paired import interval, last_difference
from megatron_let.metrics.read import RunMetrics, load_metrics
from megatron_let.run.output_folder import read_settings

_CHECKPOINTS = "checkpoints"
_EVALUATION = "evaluation/results.json"
# What runs of one variant have in common; each seed may have its own teacher and data.
_METHOD = ("let_method", "let_loss", "let_weight", "let_stop_step", "let_layer")

Curve = dict[int, float]


@dataclass(frozen=True)
class ComparedRun:
    """One run: its metrics, settings and downstream accuracy.

    Attributes:
        name: name of its variant; runs of one name differ in the seed.
        path: its folder or metrics file.
        settings: settings by argument name; None if the folder does not record them.
        downstream: average accuracy in percent of the last evaluated checkpoint.
        evaluated: how that was evaluated: tasks, examples, items.
        other_models: the evaluated models if none of them is the run's.
    """

    name: str
    path: Path
    metrics: RunMetrics
    settings: dict[str, Any] | None = None
    downstream: float | None = None
    evaluated: dict[str, Any] = field(default_factory=dict)
    other_models: tuple[str, ...] = ()

    @property
    def method(self) -> str | None:
        """Return the value of `--let-method`, `none` for a baseline; None if unknown."""
        return None if self.settings is None else self.settings.get("let_method")

    @property
    def seed(self) -> Any:
        """Return the value of `--seed`; None if unknown."""
        return (self.settings or {}).get("seed")

    @property
    def is_unfinished(self) -> bool:
        """Return whether the run took fewer steps than `--train-iters`; true if that is unknown."""
        wanted = (self.settings or {}).get("train_iters")
        return wanted is None or self.metrics.last_step < wanted

    def seconds(self) -> Curve:
        """Return the training time up to each step, without evaluations and checkpoints.

        A step without a row takes what its neighbours take; without a row of the first step the
        time of every step is unknown, and the curve is empty.
        """
        return self._cumulative(lambda row: row["step_seconds"])

    def tokens(self) -> Curve:
        """Return the number of tokens trained on up to each step, like `seconds`."""
        return self._cumulative(lambda row: row["tokens_per_second"] * row["step_seconds"])

    def _cumulative(self, amount: Callable[[dict[str, Any]], float]) -> Curve:
        rows = self.metrics.steps
        if 1 not in rows:
            return {}
        steps, known = range(1, max(rows) + 1), sorted(rows)
        amounts = np.interp(steps, known, [amount(rows[step]) for step in known])
        return dict(zip(steps, accumulate(amounts.tolist()), strict=True))

    @property
    def peak_memory_bytes(self) -> int | None:
        """Return the peak memory in bytes of the rank with the most."""
        sizes = [row["max_memory_bytes"] for row in self.metrics.steps.values()]
        return max(sizes, default=None)


def load_run(name: str, path: Path) -> ComparedRun:
    """Load a run from its folder, or from a metrics file alone.

    Raises:
        LETError: there is no metrics file.
    """
    metrics = path / METRICS if path.is_dir() else path
    if not metrics.is_file():
        raise LETError(
            f"The run {path} has no {metrics.name}; give a folder that a run with"
            " --let-metrics-path wrote to, or the file itself."
        )
    folder = metrics.parent
    settings = read_settings(folder / _CHECKPOINTS)
    return ComparedRun(name, path, load_metrics(metrics), settings, *_downstream(folder))


def _downstream(folder: Path) -> tuple[float | None, dict[str, Any], tuple[str, ...]]:
    """Return the average accuracy of the run's last evaluated checkpoint, and its conditions.

    Or else the names of the models that were evaluated instead.
    """
    if not (folder / _EVALUATION).is_file():
        return None, {}, ()
    stored = json.loads((folder / _EVALUATION).read_text())
    models = [model for model in stored["models"] if _is_of(folder, Path(model["model"]))]
    if not models:
        return None, {}, tuple(model["model"] for model in stored["models"])
    latest = max(models, key=lambda model: model["tokens"] or 0)
    conditions = {name: stored.get(name) for name in ("num_fewshot", "limit")}
    tasks = sorted(result["task"] for result in latest["results"])
    return float(latest["average"]), {"tasks": tasks, **conditions}, ()


def _is_of(folder: Path, model: Path) -> bool:
    """Return whether a model is one of this run, which may have been moved since.

    Its path may be relative to the folder, and its checkpoints a link to another disk.
    """
    below = Path(os.path.normpath(folder / model))
    inside = below.is_relative_to(os.path.normpath(folder))
    if not model.is_absolute() and inside and below.exists():
        return True
    if model.exists():
        linked = Path(os.path.abspath(model)).is_relative_to(os.path.abspath(folder))
        return linked or model.resolve().is_relative_to(folder.resolve())
    return folder.resolve().name in model.parts


def check_variants(runs: Sequence[ComparedRun]) -> None:
    """Check that the runs of one name are seeds of one variant.

    Raises:
        LETError: two of them have one seed, or other methods.
    """
    for i, run in enumerate(runs):
        for other in (earlier for earlier in runs[:i] if earlier.name == run.name):
            name = f"The runs {other.path} and {run.path} are both named {run.name}"
            how = "give them as NAME=RUN with two names"
            for setting in _METHOD:
                values = [(r.settings or {}).get(setting) for r in (other, run)]
                # Older versions, and a metrics file alone, have fewer settings.
                if None not in values and values[0] != values[1]:
                    shown = " and ".join(map(str, values))
                    raise LETError(f"{name}, and {setting} is {shown}; {how}.")
            if run.path.resolve() == other.path.resolve() or run.seed == other.seed is not None:
                raise LETError(f"{name}, and have the seed {run.seed}; {how}, or one of them.")


def find_baseline(runs: list[ComparedRun], name: str | None) -> str:
    """Return `name`, or for None the only name whose runs had no teacher.

    Raises:
        LETError: no run has that name, or not exactly one name has no teacher.
    """
    names = list(dict.fromkeys(run.name for run in runs))
    if name is not None:
        if name not in names:
            raise LETError(f"--baseline is {name} but the runs are {', '.join(names)}.")
        return name
    found = list(dict.fromkeys(run.name for run in runs if run.method == "none"))
    if len(found) != 1:
        raise LETError(
            f"Of the runs {', '.join(names)} those without a teacher are:"
            f" {', '.join(found) or 'none'}; name the baseline by --baseline NAME."
        )
    return found[0]


@dataclass(frozen=True)
class Spread:
    """Mean, minimum and maximum of one figure over `count` seeds."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self | None:
        """Summarise the finite values; None if there are none."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known:
            return None
        return cls(statistics.fmean(known), min(known), max(known), len(known))


@dataclass(frozen=True)
class Variant:
    """All runs of one name, and their figures over seeds.

    Attributes:
        runs: one run per seed.
        figures: spread of each key of `run_figures`; None if no run has the figure.
        notes: reasons why the comparison is incomplete or unfair.
        has_target: whether the baseline has a last held-out loss to reach.
        num_unfinished: unfinished runs that have not reached it nor been evaluated at its step.
        interval: 95 % interval of the mean `difference` over choices of the held-out text.
    """

    name: str
    runs: list[ComparedRun]
    figures: dict[str, Spread | None]
    notes: list[str]
    has_target: bool = True
    num_unfinished: int = 0
    interval: tuple[float, float] | None = None

    @property
    def num_reached(self) -> int:
        """Return how many runs reached the baseline's last held-out loss."""
        steps = self.figures["steps_to_target"]
        return 0 if steps is None else steps.count


def compare(runs: list[ComparedRun], baseline: str) -> list[Variant]:
    """Compare each run with the run named `baseline` of its seed, or else the first.

    Returns:
        One variant per name in the order of the runs, but the baseline first.
    """
    by_name: dict[str, list[ComparedRun]] = {baseline: []}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    return [_variant(name, members, by_name[baseline]) for name, members in by_name.items()]


def _variant(name: str, runs: list[ComparedRun], baselines: list[ComparedRun]) -> Variant:
    partners = [next((b for b in baselines if b.seed == r.seed), baselines[0]) for r in runs]
    pairs = list(zip(runs, partners, strict=True))
    found = [run_figures(run, partner) for run, partner in pairs]
    return Variant(
        name=name,
        runs=runs,
        figures={key: Spread.of(figures[key] for figures in found) for key in found[0]},
        notes=[note for run, partner in pairs for note in _notes(run, partner)],
        has_target=any(_target(partner) is not None for partner in partners),
        num_unfinished=sum(
            figures["steps_to_target"] is figures["difference"] is run.metrics.diverged_at is None
            and run.is_unfinished
            for run, figures in zip(runs, found, strict=True)
        ),
        # Another seed has the held-out text in another order.
        interval=interval([(run.metrics, partner.metrics) for run, partner in pairs])
        if all(run.seed == partner.seed for run, partner in pairs)
        else None,
    )


def _target(baseline: ComparedRun) -> float | None:
    """Return the baseline's last held-out loss, None if there is none or it is not finite."""
    loss = baseline.metrics.final_valid_loss
    return loss if loss is not None and math.isfinite(loss) else None


def run_figures(run: ComparedRun, baseline: ComparedRun) -> dict[str, float | None]:
    """Return the figures of a run.

    The target is the baseline's last held-out loss, and `difference` the run's at that step minus
    it; `steps_to_target` and `seconds_to_target` are None if the run never reached it or its time
    is unknown. `speed_up` and `time_speed_up` are the baseline's steps and training seconds to the
    target, which it may pass before its last evaluation, over those of the run.
    """
    target = _target(baseline)
    steps, needed = (
        None if target is None else steps_to_reach(r.metrics.valid_loss, target)
        for r in (run, baseline)
    )
    seconds = _at(run.seconds(), steps)
    rates = [row["tokens_per_second"] for step, row in run.metrics.steps.items() if step > 1]
    return {
        "final_loss": run.metrics.final_valid_loss,
        "difference": last_difference(run.metrics, baseline.metrics),
        "steps_to_target": steps,
        "speed_up": _ratio(needed, steps),
        "seconds_to_target": seconds,
        "time_speed_up": _ratio(_at(baseline.seconds(), needed), seconds),
        "training_seconds": _at(run.seconds(), run.metrics.last_step),
        "tokens_per_second": statistics.median(rates) if rates else None,
        "teacher_step_cost": teacher_step_cost(run.metrics, baseline.metrics),
        "peak_memory_bytes": run.peak_memory_bytes,
        "downstream": run.downstream,
    }


def steps_to_reach(valid_loss: Curve, target: float) -> float | None:
    """Return the first step, interpolated, with a loss of at most `target`; None for never."""
    previous: tuple[int, float] | None = None
    for step in sorted(valid_loss):
        loss = valid_loss[step]
        if math.isnan(loss):
            continue
        if loss <= target:
            if previous is None or previous[1] <= loss:
                return float(step)
            before, above = previous
            # Rounded up, it would be beyond the run's last step.
            return min(before + (step - before) * (above - target) / (above - loss), float(step))
        previous = (step, loss)
    return None


def teacher_step_cost(metrics: RunMetrics, baseline: RunMetrics) -> float | None:
    """Return the median time of a step with the teacher over one without.

    The latter is of the same run, or of the baseline if the run has the teacher in all steps.
    """
    with_teacher = metrics.step_seconds(aligned=True)
    without = metrics.step_seconds(aligned=False) or baseline.step_seconds(aligned=False)
    if not with_teacher or not without:
        return None
    return statistics.median(with_teacher) / statistics.median(without)


def _at(curve: Curve, step: float | None) -> float | None:
    """Interpolate a cumulative curve at a step; None beyond the last step of the run."""
    if step is None or not curve or step > max(curve):
        return None
    return float(np.interp(step, [0, *curve], [0.0, *curve.values()]))


def _ratio(baseline: float | None, run: float | None) -> float | None:
    return baseline / run if baseline and run else None


def _notes(run: ComparedRun, baseline: ComparedRun) -> list[str]:
    notes, steps = [], run.metrics.last_step
    wanted = (run.settings or {}).get("train_iters") or steps
    if not steps:
        notes.append("unfinished, no step was taken")
    elif steps < wanted:
        notes.append(f"unfinished, {steps} of {wanted} steps")
    if run.metrics.diverged_at is not None:
        notes.append(f"diverged at step {run.metrics.diverged_at}, its loss is not finite")
    if not run.metrics.valid_loss:
        notes.append("never evaluated")
    if run.other_models:
        notes.append(f"its {_EVALUATION} lists other models: {', '.join(run.other_models)}")
    if missing := [step for step in range(1, steps) if step not in run.metrics.steps]:
        fate = "their time is interpolated" if missing[0] > 1 else "so its time is unknown"
        notes.append(f"no metrics of {_ranges(missing)}, {fate}")
    notes += [
        f"{name} was changed from {before} to {since} at step {step}"
        for step, changed in run.metrics.changes.items()
        for name, (before, since) in changed.items()
    ]
    if run is not baseline:
        notes += differences(run, baseline)
    return [f"{run.path.name}: {note}" for note in notes]


def _ranges(steps: list[int]) -> str:
    """Return ascending steps as text, such as `steps 3, 13 to 14`."""
    given = set(steps)
    starts = [step for step in steps if step - 1 not in given]
    ends = [step for step in steps if step + 1 not in given]
    pairs = zip(starts, ends, strict=True)
    return "steps " + ", ".join(f"{a} to {b}" if a < b else str(a) for a, b in pairs)


def differences(run: ComparedRun, baseline: ComparedRun) -> list[str]:
    """Describe each setting other than the method's in which two runs differ."""
    ours, theirs = run.settings, baseline.settings
    if ours is None or theirs is None:
        return ["the settings are unknown, so the comparison may be unfair"]
    # Older versions stored fewer settings.
    shared = [name for name in ours if name in theirs and not name.startswith("let_")]
    found = [
        f"{name} is {ours[name]}, the baseline's {theirs[name]}"
        for name in shared
        if ours[name] != theirs[name]
    ]
    if run.evaluated and baseline.evaluated and run.evaluated != baseline.evaluated:
        found.append(f"downstream is of {run.evaluated}, the baseline's of {baseline.evaluated}")
    return found
