"""A comparison as a table, as pictures, and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from megatron_let.metrics.compare import ComparedRun, Curve, Line, Spread
from megatron_let.metrics.provenance import write_csv

_GIB = 2**30
COLUMNS = (
    "run", "seeds", "held-out loss", "steps to the baseline's loss", "speed-up in steps",
    "seconds to it", "speed-up in time", "tokens/s", "step with teacher / without", "peak GiB",
    "downstream %",
)  # fmt: skip


def table_rows(lines: list[Line]) -> list[tuple[str, ...]]:
    """Cells of each line, under `COLUMNS`."""
    return [
        (
            line.name,
            str(len(line.runs)),
            _cell(line.final_loss, "{:.4f}"),
            _reached(line, line.steps_to_target, "{:.0f}"),
            _cell(line.speed_up, "{:.2f}x"),
            _cell(line.seconds_to_target, "{:.0f}"),
            _cell(line.time_speed_up, "{:.2f}x"),
            _cell(line.tokens_per_second, "{:.0f}"),
            _cell(line.teacher_step_cost, "{:.2f}x"),
            _cell(line.peak_memory_bytes, "{:.2f}", 1 / _GIB),
            _cell(line.downstream, "{:.1f}"),
        )
        for line in lines
    ]


def _cell(spread: Spread | None, form: str, factor: float = 1.0) -> str:
    """Mean, and from smallest to largest where there are several."""
    if spread is None:
        return "–"
    mean, low, high = (form.format(v * factor) for v in (spread.mean, spread.low, spread.high))
    return mean if spread.count == 1 else f"{mean} ({low}–{high})"


def _reached(line: Line, spread: Spread | None, form: str) -> str:
    if spread is None:
        return "never"
    missing = len(line.runs) - line.num_reached
    return _cell(spread, form) + (f", {missing} never" if missing else "")


def figures(lines: list[Line]) -> dict[str, Figure]:
    """Pictures by the name of their file, without those that would be empty."""
    found = {
        "loss_steps": _losses(lines, "step", lambda run: None),
        "loss_tokens": _losses(lines, "tokens", ComparedRun.tokens),
        "loss_seconds": _losses(lines, "seconds of training", ComparedRun.seconds),
        "loss_memory": _memory(lines),
        "cosine": _teacher_curves(lines, "let_cosine", "cosine"),
        "weight": _teacher_curves(lines, "let_weight", "weight of the teacher's loss"),
        "downstream": _downstream(lines),
    }
    return {name: figure for name, figure in found.items() if figure.axes[0].has_data()}


def _axes(x_label: str, y_label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _losses(lines: list[Line], label: str, scale: Callable[[ComparedRun], Curve | None]) -> Figure:
    """Held-out loss of each run; runs of one name have one colour, and their mean a thick line."""
    figure, axes = _axes(label, "held-out loss")
    values: list[float] = []
    for index, line in enumerate(lines):
        color = f"C{index % 10}"
        for number, run in enumerate(line.runs):
            points = list(_points(run.metrics.valid_loss, scale(run)))
            values += [y for _, y in points]
            label_once = line.name if number == 0 else None
            axes.plot(*_columns(points), color=color, marker="o", markersize=3, linewidth=1,
                      label=label_once)  # fmt: skip
    if values:
        # The first steps fall from ln(vocabulary) and would flatten everything after them.
        axes.set_ylim(min(values) - 0.05, min(values) + max(1.0, 0.3 * (max(values) - min(values))))
        axes.legend()
    return figure


def _points(curve: Curve, scale: Curve | None) -> Iterator[tuple[float, float]]:
    """Of a curve over steps, or over what `scale` makes of a step."""
    for step in sorted(curve):
        if scale is None:
            yield step, curve[step]
        elif step in scale:
            yield scale[step], curve[step]


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _memory(lines: list[Line]) -> Figure:
    figure, axes = _axes("peak memory (GiB)", "last held-out loss")
    for index, line in enumerate(lines):
        points = [
            (run.peak_memory_bytes / _GIB, run.metrics.final_valid_loss)
            for run in line.runs
            if run.peak_memory_bytes is not None and run.metrics.final_valid_loss is not None
        ]
        if points:
            axes.scatter(*_columns(points), color=f"C{index % 10}", label=line.name)
            axes.legend()
    return figure


def _teacher_curves(lines: list[Line], key: str, label: str) -> Figure:
    figure, axes = _axes("step", label)
    for index, line in enumerate(lines):
        label_once: str | None = line.name
        for run in line.runs:
            curve = {
                s: row[key] for s, row in run.metrics.steps.items() if row.get(key) is not None
            }
            if curve:
                points = list(_points(curve, None))
                axes.plot(*_columns(points), color=f"C{index % 10}", linewidth=1, label=label_once)
                axes.legend()
                label_once = None
    return figure


def _downstream(lines: list[Line]) -> Figure:
    figure, axes = _axes("", "average downstream accuracy (%)")
    for line in lines:
        if line.downstream is not None:
            spread = line.downstream
            error = [[spread.mean - spread.low], [spread.high - spread.mean]]
            axes.bar(line.name, spread.mean, yerr=error, capsize=4)
    return figure


def notes(lines: list[Line], baseline: str) -> list[str]:
    """What a reader must know, one sentence each."""
    found = [
        f"Held against {baseline}: the step and the second at which a run's held-out loss is the"
        " last one of the baseline of its seed, interpolated between evaluations. Ranges are over"
        " seeds. Seconds are of training steps alone."
    ]
    return found + [f"{line.name}: {note}." for line in lines for note in line.notes]


_STYLE = (
    "body{font-family:sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{border:1px solid #999;padding:.3em .6em;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
    ".pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(28em,1fr))}"
)


def page(title: str, lines: list[Line], remarks: list[str], pictures: dict[str, bytes]) -> str:
    """The HTML, with the pictures inside."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in table_rows(lines)
    )
    images = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}">\n'
        for name, data in pictures.items()
    )
    remarked = "".join(f"<li>{html.escape(text)}</li>\n" for text in remarks)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>\n"
        f"<table><tr>{head}</tr>\n{body}</table>\n<ul>\n{remarked}</ul>\n"
        f'<div class="pictures">\n{images}</div></body></html>\n'
    )


def write_comparison(
    out: Path, title: str, lines: list[Line], baseline: str, source: dict[str, str]
) -> list[Path]:
    """Write index.html, a PNG each picture, comparison.csv and losses.csv; return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, figure in figures(lines).items():
        partial = out / f"partial-{name}.png"
        figure.savefig(partial, dpi=110)
        partial.replace(out / f"{name}.png")
        pictures[name] = (out / f"{name}.png").read_bytes()
    remarks = [*notes(lines, baseline), *(f"{key}: {value}" for key, value in source.items())]
    partial = out / "partial-index.html"
    partial.write_text(page(title, lines, remarks, pictures))
    partial.replace(out / "index.html")
    write_csv(out / "comparison.csv", _csv_rows(lines), source)
    losses = _loss_rows(lines)
    if losses:
        write_csv(out / "losses.csv", losses, source)
    tables = ["comparison.csv", *(["losses.csv"] if losses else [])]
    return [out / name for name in ("index.html", *(f"{n}.png" for n in pictures), *tables)]


def _csv_rows(lines: list[Line]) -> list[dict[str, Any]]:
    """A row a line: mean, smallest and largest of each figure."""
    names = (
        "final_loss", "steps_to_target", "speed_up", "seconds_to_target", "time_speed_up",
        "tokens_per_second", "teacher_step_cost", "peak_memory_bytes", "downstream",
    )  # fmt: skip
    rows = []
    for line in lines:
        row: dict[str, Any] = {"run": line.name, "seeds": len(line.runs)}
        row["reached"] = line.num_reached
        for name in names:
            spread: Spread | None = getattr(line, name)
            for part in ("mean", "low", "high"):
                value = None if spread is None else getattr(spread, part)
                row[f"{name}_{part}"] = "" if value is None else f"{value:.6g}"
        rows.append(row)
    return rows


def _loss_rows(lines: list[Line]) -> list[dict[str, Any]]:
    """A row an evaluation."""
    return [
        {
            "run": line.name,
            "seed": (run.settings or {}).get("seed", ""),
            "step": step,
            "valid_loss": run.metrics.valid_loss[step],
        }
        for line in lines
        for run in line.runs
        for step in sorted(run.metrics.valid_loss)
    ]
