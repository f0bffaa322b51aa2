"""Metrics files compared: how far ahead a run is, what it cost, and the curves."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunMetrics:
    """One run's metrics: the last row of each iteration.

    Attributes:
        steps: training rows by iteration.
        valid_loss: validation loss by iteration.
    """

    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    valid_loss: dict[int, float] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """The largest iteration trained; 0 for none."""
        return max(self.steps, default=0)

    @property
    def final_valid_loss(self) -> float | None:
        """Validation loss of the last evaluation."""
        return self.valid_loss[max(self.valid_loss)] if self.valid_loss else None

    def step_seconds(self, aligned: bool | None = None) -> list[float]:
        """Step times; of steps with or without a teacher if `aligned` is given.

        The first step is left out: it allocates memory, and loads the teacher.
        """
        return [
            row["step_seconds"]
            for iteration, row in self.steps.items()
            if iteration > 1 and aligned in (None, "let_weight" in row)
        ]


def load_metrics(path: Path) -> RunMetrics:
    """Read a metrics file; a last line that is still being written is left out."""
    run = RunMetrics()
    if not path.is_file():
        return run
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "lm_loss" in row:
            run.steps[row["iteration"]] = row
        elif "valid_loss" in row:
            run.valid_loss[row["iteration"]] = row["valid_loss"]
    return run


def steps_to_reach(valid_loss: dict[int, float], target: float) -> float | None:
    """First step, interpolated between evaluations, at which the loss is at most `target`.

    Returns:
        None if it never is.
    """
    previous: tuple[int, float] | None = None
    for step in sorted(valid_loss):
        loss = valid_loss[step]
        if loss <= target:
            if previous is None or previous[1] <= loss:
                return float(step)
            before, above = previous
            return before + (step - before) * (above - target) / (above - loss)
        previous = (step, loss)
    return None


def aligned_phase_cost(run: RunMetrics) -> float | None:
    """Median time of a step with the teacher over one without, in the same run."""
    with_teacher, without = run.step_seconds(aligned=True), run.step_seconds(aligned=False)
    if not with_teacher or not without:
        return None
    return statistics.median(with_teacher) / statistics.median(without)


def comparison_table(baseline: RunMetrics, let: RunMetrics) -> list[dict[str, Any]]:
    """One row an evaluation that both runs have: step, both losses, and the last cosine."""
    rows = []
    for step in sorted(baseline.valid_loss.keys() & let.valid_loss.keys()):
        rows.append(
            {
                "step": step,
                "baseline_valid_loss": baseline.valid_loss[step],
                "let_valid_loss": let.valid_loss[step],
                "let_cosine": let.steps.get(step, {}).get("let_cosine"),
                "let_weight": let.steps.get(step, {}).get("let_weight"),
            }
        )
    return rows


def plot_losses(runs: dict[str, RunMetrics], path: Path, title: str) -> None:
    """Draw validation loss (and the cosine, where there is one) against steps into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, cosines) = pyplot.subplots(
        2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    for name, run in runs.items():
        (line,) = losses.plot(*_curve(run.valid_loss), marker="o", markersize=3, label=name)
        training = {step: row["lm_loss"] for step, row in run.steps.items()}
        losses.plot(*_smooth(training), color=line.get_color(), alpha=0.3, linewidth=1)
        cosine = {s: row["let_cosine"] for s, row in run.steps.items() if "let_cosine" in row}
        if cosine:
            cosines.plot(*_curve(cosine), color=line.get_color())
            losses.axvline(max(cosine), color="grey", linestyle=":", linewidth=1)
            cosines.axvline(max(cosine), color="grey", linestyle=":", linewidth=1)
    losses.set_ylabel("held-out loss (faint: training)")
    losses.set_title(title)
    losses.legend()
    cosines.set_ylabel("cosine")
    cosines.set_xlabel("step (dotted: the teacher leaves)")
    partial = path.with_name("partial-" + path.name)
    figure.savefig(partial, dpi=150)
    pyplot.close(figure)
    partial.replace(path)


def _curve(values: dict[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def _smooth(values: dict[int, float], window: int = 10) -> tuple[list[int], Sequence[float]]:
    steps, losses = _curve(values)
    return steps, [
        statistics.fmean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))
    ]
