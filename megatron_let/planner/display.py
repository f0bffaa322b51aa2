"""Estimates as JSON, tables and a picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from megatron_let.placement.plan import steady_timeline
from megatron_let.planner.break_even import RunCost
from megatron_let.planner.estimate import Estimate
from megatron_let.planner.memory import Layout

_COLUMNS = ("params", "grads", "optimizer", "activations", "buffers", "teacher_weights",
            "teacher_buffers", "total", "host")  # fmt: skip
_SPAN_COLOURS = {"forward": "#9ecae1", "backward": "#4292c6", "teacher": "#fd8d3c"}
_GIB = 2**30
# The paper's speed-up, a smaller one, and none.
_SPEEDUPS = (1.6, 1.2, 1.0)


def as_json(found: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON values."""
    return {
        "layout": dataclasses.asdict(found.layout),
        "memory_gib": [stage.gib() for stage in found.memory],
        "teacher_share_of_training_flops": found.request.teacher_share,
        "baseline_seconds": found.baseline_seconds,
        "seconds": found.seconds,
        "ratio": {name: s / found.baseline_seconds for name, s in found.seconds.items()},
        "placement": found.placement,
        "tokens_per_second": found.tokens_per_second,
        "fits": found.fits,
        **found.details,
    }


def break_even_as_json(cost: RunCost) -> dict[str, Any]:
    """Return the cost of a run as JSON values."""
    return {
        **dataclasses.asdict(cost),
        "let_gpu_hours": {
            name: {f"{s:.1f}": cost.let_gpu_hours(s, ratio) for s in _SPEEDUPS}
            for name, ratio in cost.ratios.items()
        },
        "break_even_speedup": {name: cost.break_even(r) for name, r in cost.ratios.items()},
    }


def print_estimate(console: Console, found: Estimate, recipe: str, gpu: str) -> None:
    """Print memory by stage, whether it fits, and the step time by placement; then the details."""
    title = f"{recipe}: {_name(found.layout)} on {gpu}, GiB per rank"
    # Only DeepSpeed's ZeRO has buffers and host memory.
    columns = [c for c in _COLUMNS if c not in ("buffers", "host") or getattr(found.peak, c)]
    table = _table(title, "stage", *(c.replace("_", " ") for c in columns))
    for index, stage in enumerate(found.memory):
        gib = stage.gib()
        table.add_row(str(index), *(f"{gib[c]:.2f}" for c in columns))
    console.print(table)
    console.print(
        f"{'fits' if found.fits else 'does NOT fit'}: {found.peak.total / _GIB:.1f} of"
        f" {found.request.gpu.memory / _GIB:.1f} GiB, with {found.request.reserve:.0%} to stay free"
    )
    if found.peak.host:
        console.print(f"and {found.peak.host / _GIB:.0f} GiB of host memory per rank")
    _print_times(console, found)
    _print_details(console, found.details)


def _print_times(console: Console, found: Estimate) -> None:
    title = f"simulated passes of one step at {found.request.efficiency:.0%} efficiency"
    table = _table(title, "teacher", "seconds", "over baseline")
    table.add_row("none", f"{found.baseline_seconds:.2f}", "1.000")
    for name, seconds in found.seconds.items():
        best = " (best)" if name == found.placement else ""
        table.add_row(name + best, f"{seconds:.2f}", f"{seconds / found.baseline_seconds:.3f}")
    console.print(table)
    teacher = found.request.teacher
    dtype = "" if teacher is None else " in bf16" if teacher.num_bytes == 2 else " in fp32"
    console.print(
        f"teacher's forward{dtype}: {found.request.teacher_share:.2%} of the student's training"
        f" FLOPs; {found.tokens_per_second:,.0f} tokens/s"
    )


def _print_details(console: Console, details: dict[str, Any]) -> None:
    if "zero" in details:
        console.print(f"ZeRO-{details['zero']['stage']}")
    if "parameters" in details:
        total, active = details["parameters"] / 1e9, details["active_parameters"] / 1e9
        console.print(f"{total:.1f}B parameters, {active:.1f}B active per token", highlight=False)
    for line in details.get("assumptions", ()):
        console.print(f"- {line}", highlight=False)


def print_sweep(console: Console, found: list[Estimate], recipe: str, gpu: str) -> None:
    """Print the 20 fastest layouts."""
    headings = ("recompute", "GiB", "step s", "placement", "over baseline", "tokens/s")
    table = _table(f"{recipe}: {len(found)} layouts fit {gpu}", "layout", *headings)
    for each in found[:20]:
        table.add_row(
            _name(each.layout),
            each.layout.recompute,
            f"{each.peak.total / _GIB:.1f}",
            f"{each.best_seconds:.2f}",
            each.placement or "none",
            f"{each.best_seconds / each.baseline_seconds:.3f}",
            f"{each.tokens_per_second:,.0f}",
        )
    console.print(table)


def _table(title: str, *headings: str) -> Table:
    return Table(*(Column(heading, justify="right") for heading in headings), title=title)


def _name(layout: Layout) -> str:
    parts = [f"TP{layout.tp}", f"PP{layout.pp}", f"DP{layout.dp}"]
    parts += [f"CP{layout.cp}"] if layout.cp > 1 else []
    parts += [f"EP{layout.ep}"] if layout.ep > 1 else []
    parts += [f"VPP{layout.num_chunks}"] if layout.num_chunks > 1 else []
    return " ".join([*parts, f"b{layout.micro_batch_size} x {layout.num_microbatches}"])


def plot_stages(found: Estimate, path: Path) -> None:
    """Draw each stage's passes over time, one panel per placement of the teacher."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    layout, prefetch = found.layout, found.request.prefetch(found.layout)
    height = 1 + (0.6 + 0.35 * layout.pp) * len(found.seconds)
    figure, panels = pyplot.subplots(len(found.seconds), sharex=True, figsize=(11, height))
    for panel, name in zip(panels, found.seconds, strict=True):
        timeline = steady_timeline(name, layout.pipeline, found.costs, found.aligned, prefetch)
        for stage, spans in enumerate(timeline.spans):
            panel.broken_barh(
                [(span.start, span.end - span.start) for span in spans],
                (stage - 0.4, 0.8),
                facecolors=[_SPAN_COLOURS[span.kind] for span in spans],
                edgecolor="white",
                linewidth=0.4,
            )
        ratio = timeline.duration / found.baseline_seconds
        panel.set_title(f"{name}: {ratio:.3f} of a step without teacher", loc="left", fontsize=9)
        stages = range(layout.pp)
        panel.set_yticks(stages, [f"stage {stage}" for stage in stages], fontsize=7)
        panel.invert_yaxis()
        panel.axvline(found.baseline_seconds, color="grey", linestyle=":")
        panel.set_xlim(0, max(found.seconds.values()))
    panels[-1].set_xlabel("seconds (dotted: end of the step without a teacher)")
    legend = [Patch(color=colour, label=kind) for kind, colour in _SPAN_COLOURS.items()]
    figure.legend(handles=legend, loc="upper right", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def print_break_even(console: Console, cost: RunCost) -> None:
    """Print GPU hours and tokens to the baseline's loss, by where the teacher runs."""
    title = (
        f"baseline: {cost.gpu_hours:,.0f} GPU hours, {cost.tokens:.3g} tokens;"
        f" teacher in {cost.teacher_share:.1%} of its steps"
    )
    headings = [f"GPU hours at {speedup:.1f}x" for speedup in _SPEEDUPS]
    table = _table(title, "teacher", "relative GPU time per step", *headings, "break-even")
    for name, ratio in cost.ratios.items():
        hours = [f"{cost.let_gpu_hours(speedup, ratio):,.0f}" for speedup in _SPEEDUPS]
        table.add_row(name, f"{ratio:.3f}", *hours, f"{cost.break_even(ratio):.3f}x")
    tokens = [f"{cost.tokens / speedup:.3g}" for speedup in _SPEEDUPS]
    table.add_row("tokens", "", *tokens, "")
    console.print(table)


def plot_break_even(cost: RunCost, path: Path) -> None:
    """Draw GPU hours to the baseline's loss over the speed-up in tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    speedups = [1 + 0.01 * i for i in range(71)]
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, ratio in cost.ratios.items():
        hours = [cost.let_gpu_hours(speedup, ratio) / 1e3 for speedup in speedups]
        label = f"{name}: step x {ratio:.3f}, pays above {cost.break_even(ratio):.3f}x"
        axes.plot(speedups, hours, label=label)
    axes.axhline(cost.gpu_hours / 1e3, color="grey", linestyle=":", label="baseline")
    for speedup in _SPEEDUPS[:2]:
        axes.axvline(speedup, color="lightgrey", linewidth=0.8)
    axes.set_xlabel("speed-up in tokens to the baseline's loss (the paper reports 1.6)")
    axes.set_ylabel("thousand GPU hours")
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
