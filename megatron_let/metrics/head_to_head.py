"""A baseline and a LET run: how far ahead one is, what it cost, and the curves."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_let.metrics.read import RunMetrics


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


def head_to_head(runs: dict[str, RunMetrics], steps: int, tokens_per_step: int) -> dict[str, Any]:
    """Figures of a `baseline` and a `let` run of as many steps: speed-up, rates, cost, memory."""
    target = runs["baseline"].final_valid_loss
    assert target is not None, "the baseline was never evaluated"
    seconds = {m: statistics.median(run.step_seconds()) for m, run in runs.items()}
    totals = {m: sum(r["step_seconds"] for r in run.steps.values()) for m, run in runs.items()}
    return {
        "steps": steps,
        "baseline_final_valid_loss": target,
        "let_final_valid_loss": runs["let"].final_valid_loss,
        "let_steps_to_baseline_loss": steps_to_reach(runs["let"].valid_loss, target),
        "tokens_per_second": {m: tokens_per_step / s for m, s in seconds.items()},
        "training_seconds": totals,
        "aligned_phase_cost": aligned_phase_cost(runs["let"]),
        "peak_memory_bytes": {
            m: max(row["max_memory_bytes"] for row in run.steps.values()) for m, run in runs.items()
        },
    }


def sentences(summary: dict[str, Any]) -> Iterator[str]:
    """What `head_to_head` found, for a reader."""
    reached, steps = summary["let_steps_to_baseline_loss"], summary["steps"]
    final = summary["baseline_final_valid_loss"]
    if reached is None:
        yield f"LET did not reach the baseline's final held-out loss of {final:.4f}."
    else:
        yield (
            f"LET reached the baseline's final held-out loss of {final:.4f} at step {reached:.0f}"
            f" of {steps} ({steps / reached:.2f}x)."
        )
    rates = summary["tokens_per_second"]
    yield f"tokens/s (median step): baseline {rates['baseline']:.0f}, LET {rates['let']:.0f}"
    if summary["aligned_phase_cost"] is not None:
        yield f"a step with the teacher took {summary['aligned_phase_cost']:.2f}x one without"
    seconds = summary["training_seconds"]
    yield f"training time: baseline {seconds['baseline']:.0f} s, LET {seconds['let']:.0f} s"


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
    held_out = [loss for run in runs.values() for loss in run.valid_loss.values()]
    if held_out:
        # The first steps fall from ln(vocabulary) and would flatten everything after them.
        losses.set_ylim(min(held_out) - 0.5, max(held_out) + 0.2)
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
