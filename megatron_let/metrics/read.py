"""Read a metrics file."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_let.errors import LETError


@dataclass(frozen=True)
class RunMetrics:
    """One run's metrics. A step that is taken again replaces all rows from it on.

    A loss that was not finite, which a metrics file has as null, is NaN.

    Attributes:
        steps: training rows by iteration.
        valid_loss: validation loss by iteration.
        valid_microbatches: losses of the microbatches of an evaluation, by iteration.
        changes: settings that a resumed run changed, as {name: [before, since]}, by the iteration
            that it resumed at.
    """

    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    valid_loss: dict[int, float] = field(default_factory=dict)
    valid_microbatches: dict[int, list[float]] = field(default_factory=dict)
    changes: dict[int, dict[str, list[Any]]] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """Return the largest iteration trained; 0 for none."""
        return max(self.steps, default=0)

    @property
    def final_valid_loss(self) -> float | None:
        """Return the validation loss of the last evaluation; None if there was none."""
        return self.valid_loss[max(self.valid_loss)] if self.valid_loss else None

    @property
    def diverged_at(self) -> int | None:
        """Return the first step since which no loss was finite; None for a finite last loss."""
        losses = {step: row["lm_loss"] for step, row in self.steps.items()} or self.valid_loss
        finite = [step for step, loss in losses.items() if math.isfinite(loss)]
        return min((step for step in losses if step > max(finite, default=0)), default=None)

    def step_seconds(self, aligned: bool | None = None) -> list[float]:
        """Return the step times, only of steps with or without a teacher if `aligned` is given.

        The first step is left out: it allocates memory and loads the teacher.
        """
        return [
            row["step_seconds"]
            for iteration, row in self.steps.items()
            if iteration > 1 and aligned in (None, "let_weight" in row)
        ]


def load_metrics(path: Path) -> RunMetrics:
    """Read a metrics file; a missing file is an empty run, an incomplete last line is ignored.

    Raises:
        LETError: a row has a value that no run writes; names the line.
    """
    run = RunMetrics()
    if not path.is_file():
        return run
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        _check(path, number, row)
        if "lm_loss" in row:
            _forget_from(run, row["iteration"])
            run.steps[row["iteration"]] = row | {"lm_loss": _number(row["lm_loss"])}
        elif "valid_loss" in row:
            run.valid_loss[row["iteration"]] = _number(row["valid_loss"])
            run.valid_microbatches[row["iteration"]] = row.get("microbatches", [])
        elif "changed" in row:
            for name, (before, since) in row["changed"].items():
                _change(run, row["iteration"], name, before, since)
    return run


def _forget_from(run: RunMetrics, iteration: int) -> None:
    """Drop the rows of steps that the run, resumed from an earlier checkpoint, takes again."""
    # The last key is the largest.
    if iteration > next(reversed(run.steps), 0):
        return
    for rows in (run.steps, run.valid_loss, run.valid_microbatches):
        for step in [step for step in rows if step >= iteration]:
            del rows[step]
    # What had changed later holds from here on.
    later = [run.changes[step].items() for step in sorted(run.changes) if step >= iteration]
    for name, (before, since) in [entry for changed in later for entry in changed]:
        _change(run, iteration - 1, name, before, since)


def _change(run: RunMetrics, iteration: int, name: str, before: Any, since: Any) -> None:
    """Record a setting from the step after `iteration` on, whatever abandoned steps had."""
    known = [run.changes[step][name] for step in sorted(run.changes) if name in run.changes[step]]
    for step in run.changes:
        if step >= iteration:
            run.changes[step].pop(name, None)
    kept = [run.changes[step][name] for step in sorted(run.changes) if name in run.changes[step]]
    had = kept[-1][1] if kept else known[0][0] if known else before
    if had != since:
        run.changes.setdefault(iteration, {})[name] = [had, since]


def _check(path: Path, number: int, row: dict[str, Any]) -> None:
    for key in ("step_seconds", "tokens_per_second", "lm_loss", "valid_loss"):
        value, is_loss = row.get(key, 1), key.endswith("loss")
        valid = isinstance(value, int | float) and (is_loss or value > 0)
        if not valid and not (is_loss and value is None):
            raise LETError(
                f"{path}, line {number}: {key} is {value!r}; give the file as its run wrote it."
            )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
