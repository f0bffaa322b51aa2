"""Paired differences of held-out losses and their interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from megatron_let.metrics.paired import interval, last_difference
from megatron_let.metrics.read import RunMetrics

GENERATOR = np.random.default_rng(3)
BASELINE = GENERATOR.normal(5, 1, 40).tolist()


def run(losses: list[float], step: int = 8) -> RunMetrics:
    return RunMetrics(
        valid_loss={4: 7.0, step: float(np.mean(losses))},
        valid_microbatches={4: [7.0] * len(losses), step: losses},
    )


def test_difference_is_at_the_baselines_last_evaluation() -> None:
    assert last_difference(run([3.0, 4.0]), run([5.0, 6.0])) == -2.0
    assert last_difference(run([3.0], step=6), run([5.0])) is None
    assert last_difference(run([3.0]), RunMetrics()) is None


def test_interval_is_that_of_scipy() -> None:
    ours = (np.array(BASELINE) + GENERATOR.normal(-0.1, 0.2, 40)).tolist()
    found = interval([(run(ours), run(BASELINE))])
    differences = np.subtract(ours, BASELINE)
    expected = bootstrap(
        (differences,), np.mean, n_resamples=10_000, method="percentile", rng=1
    ).confidence_interval
    assert found == pytest.approx(tuple(expected), abs=3e-3)


def test_text_that_is_harder_for_both_runs_does_not_widen_it() -> None:
    low, high = interval([(run([x - 0.1 for x in BASELINE]), run(BASELINE))]) or (0, 0)
    assert (low, high) == pytest.approx((-0.1, -0.1))


def test_another_order_of_the_same_text_does_not_narrow_it() -> None:
    # Megatron shuffles the held-out text by the seed.
    effects = GENERATOR.normal(-0.1, 1, 40)
    pairs = []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(40)
        theirs = np.array(BASELINE)[order]
        pairs.append((run((theirs + effects[order]).tolist()), run(theirs.tolist())))
    one, several = interval(pairs[:1]), interval(pairs)
    assert one is not None and several == pytest.approx(one, abs=0.02)


@pytest.mark.parametrize(
    "other", [RunMetrics(), run([]), run(BASELINE[:39]), run([float("nan"), *BASELINE[1:]])]
)
def test_runs_without_the_same_microbatches_have_none(other: RunMetrics) -> None:
    assert interval([(other, run(BASELINE))]) is None
    assert interval([]) is None
