"""Differences between runs in the loss of the same held-out text, with their uncertainty."""

from collections.abc import Sequence

import numpy as np

from megatron_let.metrics.read import RunMetrics

RESAMPLES = 10_000
# Ends of a 95 % interval.
QUANTILES = (0.025, 0.975)


def last_difference(run: RunMetrics, baseline: RunMetrics) -> float | None:
    """Return the loss of a run minus the baseline's, at the last evaluation of the baseline.

    None if the run was not evaluated there.
    """
    last = max(baseline.valid_loss, default=None)
    if last is None or last not in run.valid_loss:
        return None
    return run.valid_loss[last] - baseline.valid_loss[last]


def interval(pairs: Sequence[tuple[RunMetrics, RunMetrics]]) -> tuple[float, float] | None:
    """Return a 95 % bootstrap interval of the mean of `last_difference` over (run, baseline) pairs.

    The evaluation's microbatches are resampled, the same ones for both runs of a pair: it is the
    uncertainty that comes from the choice of the held-out text, with these seeds. Megatron shuffles
    that text by the seed, so the ends of the pairs' intervals are averaged, which is their mean's
    interval if a text has the same effect in each pair, and too wide if not.

    None if a run has no losses of microbatches, or another number than its baseline.
    """
    ends: list[tuple[float, float]] = []
    for run, baseline in pairs:
        last = max(baseline.valid_loss, default=0)
        ours, theirs = (m.valid_microbatches.get(last, []) for m in (run, baseline))
        if not ours or len(ours) != len(theirs):
            return None
        differences = np.subtract(ours, theirs)
        if not np.isfinite(differences).all():
            return None
        ends.append(_resampled(differences))
    if not ends:
        return None
    low, high = np.mean(ends, axis=0).tolist()
    return low, high


def _resampled(differences: np.ndarray) -> tuple[float, float]:
    drawn = np.random.default_rng(0).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.quantile(differences[drawn].mean(axis=1), QUANTILES).tolist()
    return low, high
