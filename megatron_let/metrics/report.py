"""The report of a comparison: tables, pictures, CSV files and one self-contained HTML page."""

import base64
import html
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from megatron_let.files.atomic import atomic_file
from megatron_let.metrics.compare import ComparedRun, Curve, Variant, run_figures
from megatron_let.metrics.provenance import write_csv

_GIB = 2**30
_Points = list[tuple[float, float]]

# Key in `Variant.figures`, heading, format, and unit in which the cell is given.
_FIGURES = (
    ("final_loss", "held-out loss", "{:.4f}", 1),
    ("difference", "minus the baseline's", "{:+.4f}", 1),
    ("steps_to_target", "steps to the baseline's loss", "{:.0f}", 1),
    ("speed_up", "speed-up in steps", "{:.2f}x", 1),
    ("seconds_to_target", "seconds to the baseline's loss", "{:.0f}", 1),
    ("time_speed_up", "speed-up in time", "{:.2f}x", 1),
    ("training_seconds", "seconds in all", "{:.0f}", 1),
    ("tokens_per_second", "tokens/s", "{:.0f}", 1),
    ("teacher_step_cost", "step with teacher / without", "{:.2f}x", 1),
    ("peak_memory_bytes", "peak GiB", "{:.2f}", _GIB),
    ("downstream", "downstream %", "{:.1f}", 1),
)
# Figures of the runs that reached the baseline's last loss.
_TO_TARGET = ("steps_to_target", "speed_up", "seconds_to_target", "time_speed_up")
COLUMNS = ("run", "seeds", *(heading for _, heading, _, _ in _FIGURES))


def table_rows(variants: list[Variant]) -> list[tuple[str, ...]]:
    """Return the cells of each variant, under `COLUMNS`."""
    return [
        (
            variant.name,
            str(len(variant.runs)),
            *(_cell(variant, key, form, unit) for key, _, form, unit in _FIGURES),
        )
        for variant in variants
    ]


def _cell(variant: Variant, key: str, form: str, unit: int) -> str:
    """Format the mean, and the range over several seeds."""
    spread = variant.figures[key]
    absent = {reason: count for reason, count in _absent(variant, key).items() if count > 0}
    if spread is None:
        return " or ".join(absent) or "–"
    mean, low, high = (form.format(v / unit) for v in (spread.mean, spread.low, spread.high))
    cell = mean if spread.count == 1 else f"{mean} ({low}–{high})"
    return ", ".join((cell, *(f"{count} {reason}" for reason, count in absent.items())))


def _num_having(variant: Variant, key: str) -> int:
    # A run that reached the baseline's loss may have no seconds.
    spread = variant.figures["steps_to_target" if key in _TO_TARGET else key]
    return 0 if spread is None else spread.count


def _absent(variant: Variant, key: str) -> dict[str, int]:
    """Return how many runs are without a figure, by reason, if it is known."""
    missing = len(variant.runs) - _num_having(variant, key)
    diverged = sum(run.metrics.diverged_at is not None for run in variant.runs)
    if key in _TO_TARGET and variant.has_target:
        unfinished = variant.num_unfinished
        return {"never": missing - unfinished, "unfinished": unfinished}
    return {"diverged": min(missing, diverged)} if key in ("final_loss", "difference") else {}


def two_runs(variants: list[Variant]) -> tuple[ComparedRun, ComparedRun] | None:
    """Return the baseline's run and the other one, if there are only these two."""
    runs = [run for variant in variants for run in variant.runs]
    return (runs[0], runs[1]) if len(variants) == len(runs) == 2 else None


def step_rows(baseline: ComparedRun, run: ComparedRun) -> list[tuple[str, ...]]:
    """Return the header, and a row with both held-out losses at each step that both evaluated."""
    theirs, ours = baseline.metrics.valid_loss, run.metrics.valid_loss
    rows: list[tuple[str, ...]] = [
        ("step", baseline.name, run.name, "difference", "cosine", "weight")
    ]
    for step in sorted(theirs.keys() & ours.keys()):
        losses = f"{theirs[step]:.4f}", f"{ours[step]:.4f}", f"{ours[step] - theirs[step]:+.4f}"
        values = _teacher_values(run, step).values()
        rows.append((str(step), *losses, *("" if v is None else f"{v:.3f}" for v in values)))
    return rows


def _teacher_values(run: ComparedRun, step: int) -> dict[str, float | None]:
    row = run.metrics.steps.get(step, {})
    return {key: row.get(key) for key in ("let_cosine", "let_weight")}


def notes(variants: list[Variant]) -> list[str]:
    """Return the notes on a comparison, one sentence each; the baseline comes first."""
    found = [
        f"Compared with {variants[0].name}: the step and the second at which a run's held-out loss"
        " reaches the last one of the baseline of its seed, interpolated between evaluations."
        " Ranges are over seeds. Seconds are of training steps alone."
    ]
    if pair := two_runs(variants):
        found += _speed_up(*pair)
    for variant in variants[1:]:
        spread = variant.figures["difference"]
        if spread is not None and variant.interval is not None:
            low, high = variant.interval
            found.append(
                f"{variant.name}: the mean difference of the last held-out loss from the"
                f" baseline's is {spread.mean:+.4f}, and {low:+.4f} to {high:+.4f} in 95 % of"
                " resamples of the held-out text."
            )
    return found + [f"{variant.name}: {note}." for variant in variants for note in variant.notes]


def _speed_up(baseline: ComparedRun, run: ComparedRun) -> Iterator[str]:
    """Yield when a run reached the baseline's last held-out loss, in steps and seconds."""
    figures, target = run_figures(run, baseline), baseline.metrics.final_valid_loss
    steps, seconds = figures["steps_to_target"], figures["seconds_to_target"]
    if target is None or math.isnan(target):
        return
    if steps is None:
        yield f"{run.name} did not reach the baseline's final held-out loss of {target:.4f}."
    else:
        ratio = figures["time_speed_up"]
        yield (
            f"{run.name} reached the baseline's final held-out loss of {target:.4f} at step"
            f" {steps:.0f} of {run.metrics.last_step} ({figures['speed_up']:.2f}x), after"
            f" {'an unknown time' if seconds is None else f'{seconds:.0f} s'} of training"
            f" ({'ratio unknown' if ratio is None else f'{ratio:.2f}x'})."
        )


def figures(variants: list[Variant]) -> dict[str, Figure]:
    """Draw the pictures, by file name; those without data are left out."""
    loss, weight = "held-out loss", "weight of the teacher's loss"
    found = {
        "loss_steps": _curves(variants, "step", loss, lambda run: _losses(run, None)),
        "loss_tokens": _curves(variants, "tokens", loss, lambda run: _losses(run, run.tokens())),
        "loss_seconds": _curves(
            variants, "seconds of training", loss, lambda run: _losses(run, run.seconds())
        ),
        "loss_memory": _curves(variants, "peak memory (GiB)", "last " + loss, _last_loss),
        "cosine": _curves(variants, "step", "cosine", lambda run: _values(run, "let_cosine")),
        "weight": _curves(variants, "step", weight, lambda run: _values(run, "let_weight")),
        "downstream": _downstream(variants),
    }
    return {name: figure for name, figure in found.items() if figure.axes[0].has_data()}


def _losses(run: ComparedRun, scale: Curve | None) -> _Points:
    """Return the held-out losses over steps, or over the value of `scale` at each step."""
    losses = sorted(run.metrics.valid_loss.items())
    if scale is None:
        return [(step, loss) for step, loss in losses]
    return [(scale[step], loss) for step, loss in losses if step in scale]


def _last_loss(run: ComparedRun) -> _Points:
    peak, loss = run.peak_memory_bytes, run.metrics.final_valid_loss
    return [] if peak is None or loss is None else [(peak / _GIB, loss)]


def _values(run: ComparedRun, key: str) -> _Points:
    steps = sorted(run.metrics.steps.items())
    return [(step, row[key]) for step, row in steps if row.get(key) is not None]


def _axes(x_label: str, y_label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _curves(
    variants: list[Variant], x_label: str, y_label: str, points_of: Callable[[ComparedRun], _Points]
) -> Figure:
    """Draw one curve per run, in the colour of its variant."""
    figure, axes = _axes(x_label, y_label)
    values: list[float] = []
    for index, variant in enumerate(variants):
        label: str | None = variant.name
        for points in filter(None, map(points_of, variant.runs)):
            x, y = zip(*points, strict=True)
            marker = "o" if len(points) < 100 else None
            axes.plot(x, y, f"C{index % 10}", marker=marker, markersize=3, lw=1, label=label)
            values += y
            label = None
    values = [value for value in values if math.isfinite(value)]
    if values:
        axes.legend()
    if values and y_label == "held-out loss":
        # The first steps fall from ln(vocabulary) and would flatten everything after them.
        low, high = min(values), max(values)
        axes.set_ylim(low - 0.05, low + max(1.0, 0.3 * (high - low)))
    return figure


def _downstream(variants: list[Variant]) -> Figure:
    figure, axes = _axes("", "average downstream accuracy (%)")
    for variant in variants:
        spread = variant.figures["downstream"]
        if spread is not None:
            error = [[spread.mean - spread.low], [spread.high - spread.mean]]
            axes.bar(variant.name, spread.mean, yerr=error, capsize=4)
    return figure


_STYLE = (
    "body{font-family:sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{border:1px solid #999;padding:.3em .6em;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
    ".pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(28em,1fr))}"
)


def page(
    title: str, variants: list[Variant], remarks: list[str], pictures: dict[str, bytes]
) -> str:
    """Return the HTML, with the PNG pictures inside."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in table_rows(variants)
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
    out: Path,
    title: str,
    variants: list[Variant],
    source: dict[str, str],
    remarks: Sequence[str] = (),
) -> list[Path]:
    """Write index.html, one PNG per picture, comparison.csv and losses.csv; return their paths.

    Args:
        source: provenance of the numbers.
        remarks: sentences for the page, after those of `notes`.
    """
    out.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, figure in figures(variants).items():
        with atomic_file(out / f"{name}.png") as partial:
            figure.savefig(partial, dpi=110, format="png")
        pictures[name] = (out / f"{name}.png").read_bytes()
    remarks = [*notes(variants), *remarks, *(f"{key}: {value}" for key, value in source.items())]
    with atomic_file(out / "index.html") as partial:
        partial.write_text(page(title, variants, remarks, pictures))
    tables = {"comparison.csv": _figure_rows(variants), "losses.csv": _loss_rows(variants)}
    written = {name: rows for name, rows in tables.items() if rows}
    for name, rows in written.items():
        write_csv(out / name, rows, source)
    return [out / name for name in ("index.html", *(f"{n}.png" for n in pictures), *written)]


def _figure_rows(variants: list[Variant]) -> list[dict[str, Any]]:
    """Return one row per variant: mean, minimum and maximum of each figure."""
    rows = []
    for variant in variants:
        row: dict[str, Any] = {"run": variant.name, "seeds": len(variant.runs)}
        row["reached"] = variant.num_reached
        low, high = variant.interval or ("", "")
        row |= {"difference_interval_low": low, "difference_interval_high": high}
        for key, spread in variant.figures.items():
            for part in ("mean", "low", "high"):
                value = None if spread is None else getattr(spread, part)
                row[f"{key}_{part}"] = "" if value is None else f"{value:.6g}"
        rows.append(row)
    return rows


def _loss_rows(variants: list[Variant]) -> list[dict[str, Any]]:
    """Return one row per evaluation."""
    return [
        {"run": run.name, "seed": run.seed, "step": step, "valid_loss": loss}
        | _teacher_values(run, step)
        for variant in variants
        for run in variant.runs
        for step, loss in sorted(run.metrics.valid_loss.items())
    ]
