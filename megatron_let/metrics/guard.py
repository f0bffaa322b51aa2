"""Warn when the teacher appears to hurt the student, the paper's failure mode (its Table 6).

The guard never stops a run: the evidence is weak, and the user can lower `--let-weight` or
`--let-stop-step`.
"""

import statistics
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_let.errors import LETError
from megatron_let.metrics.read import load_metrics

# The mean cosine of the last WINDOW steps is compared with that of the WINDOW steps before.
WINDOW = 50
# A decrease of the mean cosine above the noise: half a percent of its range.
COSINE_FALL = 0.01
# How far the held-out loss exceeds the baseline's, in nats per token, and at how many evaluations
# in a row.
LOSS_MARGIN = 0.01
EVALUATIONS = 2


class Guard:
    """Check each row of a run's metrics, and give each kind of warning at most once.

    Args:
        baseline: held-out loss by iteration of the same model without a teacher; empty if unknown.
    """

    def __init__(self, baseline: Mapping[int, float], warn: Callable[[str], None]) -> None:
        self._baseline = dict(baseline)
        self._warn = warn
        self._cosines: list[float] = []
        self._losses: list[tuple[int, float]] = []
        self._worse = 0
        self._given: set[str] = set()

    def observe(self, row: Mapping[str, Any]) -> None:
        """Check one row of the metrics file."""
        if row.get("let_cosine") is not None:
            self._cosines.append(row["let_cosine"])
            self._check_cosine(row["iteration"])
        if row.get("valid_loss") is not None:
            self._check_loss(row["iteration"], row["valid_loss"])

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._given:
            self._given.add(kind)
            self._warn(message)

    def _check_cosine(self, iteration: int) -> None:
        if len(self._cosines) < 2 * WINDOW:
            return
        before = statistics.fmean(self._cosines[-2 * WINDOW : -WINDOW])
        now = statistics.fmean(self._cosines[-WINDOW:])
        if now < before - COSINE_FALL:
            self._warn_once(
                "cosine",
                f"the student moves away from the teacher: the mean cosine of the {WINDOW} steps up"
                f" to step {iteration} is {now:.3f}, after {before:.3f} in the {WINDOW} steps"
                " before; the two losses may conflict, so try a lower --let-weight or another"
                " --let-layer",
            )

    def _check_loss(self, iteration: int, loss: float) -> None:
        expected = self._baseline.get(iteration)
        if expected is not None:
            self._worse = self._worse + 1 if loss > expected + LOSS_MARGIN else 0
            if self._worse >= EVALUATIONS:
                self._warn_once(
                    "baseline",
                    f"the held-out loss at step {iteration} is {loss:.4f}, and was {expected:.4f}"
                    f" without a teacher: worse at {self._worse} evaluations in a row; the teacher"
                    " may harm the student, so try an earlier --let-stop-step or another teacher",
                )
        previous = [value for step, value in self._losses if step < iteration][-EVALUATIONS:]
        self._losses.append((iteration, loss))
        rising = [*previous, loss]
        if len(rising) > EVALUATIONS and all(a < b for a, b in pairwise(rising)):
            self._warn_once(
                "rising",
                f"the held-out loss has risen {EVALUATIONS} times in a row, to {loss:.4f} at step"
                f" {iteration}; compare with a run without a teacher by --let-guard-baseline",
            )


def load_guard(metrics: Path, baseline: Path | None, warn: Callable[[str], None]) -> Guard:
    """Build a guard and feed it the rows that a resumed run has already written to `metrics`.

    Raises:
        LETError: the baseline's file is missing or has no evaluation.
    """
    losses: dict[int, float] = {}
    if baseline is not None:
        losses = load_metrics(baseline).valid_loss
        if not losses:
            raise LETError(
                f"--let-guard-baseline {baseline} has no evaluation; give the metrics file of a"
                " run without a teacher."
            )
    guard = Guard(losses, warn)
    run = load_metrics(metrics)
    for row in run.steps.values():
        guard.observe(row)
    for iteration, loss in run.valid_loss.items():
        guard.observe({"iteration": iteration, "valid_loss": loss})
    return guard
