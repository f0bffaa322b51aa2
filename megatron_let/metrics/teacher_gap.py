"""What each method gains, against how much better its teacher is than the student becomes."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megatron_let.files.atomic import atomic_file
from megatron_let.metrics.compare import ComparedRun, run_figures
from megatron_let.metrics.paired import QUANTILES, RESAMPLES


@dataclass(frozen=True)
class Gain:
    """One run with a teacher beside the baseline of its seed.

    Attributes:
        method: name of the variant without its teacher.
        gap: the teacher's last held-out loss minus the baseline's; below 0 for a teacher that is
            better than the student becomes.
        loss: the baseline's last held-out loss minus the run's.
        steps: the baseline's steps over the run's to the baseline's last loss; None if it was not
            reached.
        seconds: the same of the training seconds.
        step: time of a step with the teacher over one without; see `teacher_step_cost`.
    """

    method: str
    teacher: str
    seed: Any
    gap: float
    loss: float
    steps: float | None
    seconds: float | None
    step: float | None


def gains(
    runs: Iterable[tuple[str, str, ComparedRun]],
    teacher_losses: Mapping[str, float],
    baselines: Sequence[ComparedRun],
) -> list[Gain]:
    """Compare each finished run with the baseline of its seed.

    Args:
        runs: method, teacher and run; left out if it was not evaluated at the baseline's last step,
            or a loss is not finite.
        teacher_losses: each teacher's last held-out loss.
    """
    found = []
    for method, teacher, run in runs:
        baseline = next((b for b in baselines if b.seed == run.seed), None)
        last = None if baseline is None else baseline.metrics.final_valid_loss
        if baseline is None or last is None:
            continue
        figures, gap = run_figures(run, baseline), teacher_losses[teacher] - last
        difference = figures["difference"]
        if difference is not None and math.isfinite(difference + gap):
            speed = (figures[key] for key in ("speed_up", "time_speed_up", "teacher_step_cost"))
            found.append(Gain(method, teacher, run.seed, gap, -difference, *speed))
    return found


@dataclass(frozen=True)
class Crossover:
    """The gap at which a method's gain in loss changes its sign.

    Attributes:
        gap: where the means over seeds, joined by lines, cross 0 first; None if they do not.
        between: gaps of the two teachers that it was interpolated between.
        low: lower end of a 95 % bootstrap interval over seeds, which does not include the error of
            the interpolation; None if no resample crosses, or fewer than two teachers have several
            seeds.
        high: its upper end.
        share: share of the resamples that cross, of those that have all teachers.
    """

    gap: float | None
    between: tuple[float, float] | None
    low: float | None
    high: float | None
    share: float


def crossover(found: Sequence[Gain], method: str) -> Crossover:
    """Return where a method begins to harm, from its gains with several teachers.

    The seeds are resampled, the same ones for all teachers, whose gains share the baselines.
    """
    points = _by_teacher(found, method)
    crossing = _crossing(list(points.values()))
    gap, between = crossing or (None, None)
    if sum(len(group) > 1 for group in points.values()) < 2:
        return Crossover(gap, between, None, None, float(gap is not None))
    generator = np.random.default_rng(0)
    seeds = list(dict.fromkeys(gain.seed for group in points.values() for gain in group))
    crossings = []
    for _ in range(RESAMPLES):
        chosen = [seeds[i] for i in generator.integers(len(seeds), size=len(seeds))]
        drawn = [[gain for seed in chosen for gain in group if gain.seed == seed]
                 for group in points.values()]  # fmt: skip
        # Without one of the teachers, the line would join others.
        if all(drawn):
            crossings.append(_crossing(drawn))
    there = [found[0] for found in crossings if found is not None]
    low, high = np.quantile(there, QUANTILES).tolist() if there else (None, None)
    return Crossover(gap, between, low, high, len(there) / max(1, len(crossings)))


def describe(found: Crossover) -> str:
    """Return a crossover as a clause."""
    if found.gap is None or found.between is None:
        return f"its gain does not change its sign (in {found.share:.0%} of the resamples it does)"
    left, right = found.between
    place = (
        f"its gain changes its sign between teachers whose loss is {left:+.2f} and {right:+.2f}"
        f" from the baseline's last, by a straight line at {found.gap:+.2f}"
    )
    if found.low is None:
        return f"{place} (too few seeds for an interval)"
    return f"{place} ({found.low:+.2f} to {found.high:+.2f} over seeds, 95 %)"


def _by_teacher(found: Sequence[Gain], method: str) -> dict[str, list[Gain]]:
    groups: dict[str, list[Gain]] = {}
    for gain in found:
        if gain.method == method:
            groups.setdefault(gain.teacher, []).append(gain)
    return groups


def _crossing(groups: Sequence[Sequence[Gain]]) -> tuple[float, tuple[float, float]] | None:
    """Return where the mean gain first crosses 0 on a line between two teachers, and their gaps."""
    means = sorted(
        (float(np.mean([g.gap for g in group])), float(np.mean([g.loss for g in group])))
        for group in groups
    )
    for (left, before), (right, after) in itertools.pairwise(means):
        if before * after < 0:
            return left + (right - left) * before / (before - after), (left, right)
    return None


def rows(found: Sequence[Gain]) -> list[dict[str, Any]]:
    """Return the rows of the CSV file, one per run."""
    names = {"gap": "teacher_minus_baseline", "loss": "loss_gain", "steps": "speed_up",
             "seconds": "time_speed_up", "step": "teacher_step_cost"}  # fmt: skip
    return [
        {names.get(key, key): f"{v:.5g}" if isinstance(v, float) else v for key, v in
         vars(gain).items()}
        for gain in found
    ]  # fmt: skip


def plot(path: Path, found: Sequence[Gain]) -> None:
    """Plot the gains in loss, steps and seconds against the gap: mean and range over seeds."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    labels = {"loss": "loss below the baseline's", "steps": "speed-up in steps",
              "seconds": "speed-up in seconds"}  # fmt: skip
    methods = list(dict.fromkeys(gain.method for gain in found))
    for panel, (key, label) in zip(panels, labels.items(), strict=True):
        panel.axvline(0, color="0.7", lw=1)
        panel.axhline(0 if key == "loss" else 1, color="0.7", lw=1)
        for index, method in enumerate(methods):
            points = sorted(
                (np.mean([g.gap for g in group]), values)
                for group in _by_teacher(found, method).values()
                if (values := [v for g in group if (v := getattr(g, key)) is not None])
            )
            if points:
                gaps, groups = zip(*points, strict=True)
                mean = np.array([np.mean(group) for group in groups])
                spread = [mean - [min(g) for g in groups], [max(g) for g in groups] - mean]
                panel.errorbar(gaps, mean, spread, color=f"C{index}", marker="o", markersize=4,
                               lw=1, capsize=3, label=method)  # fmt: skip
        panel.set(xlabel="teacher's loss minus the baseline's last", ylabel=label)
        panel.grid(alpha=0.3)
    panels[0].legend()
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
