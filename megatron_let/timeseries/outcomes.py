"""Finished fine-tuning runs: a CSV file each, Table 2's form, and a plot."""

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_let.errors import LETError
from megatron_let.files.atomic import atomic_file
from megatron_let.metrics.provenance import write_csv

METHODS = {"baseline": "without LET", "let": "LET"}
Run = Mapping[str, Any]
# A row per epoch.
Rows = list[dict[str, str]]


def is_finished(output: Path, run: Run) -> bool:
    """Return whether a run is finished: `data_set`, `method`, `seed`, and what else determines it.

    A value that the file lacks, because an earlier version wrote it, is not compared.

    Raises:
        LETError: the finished run differs in something else.
    """
    file = _file(output, run)
    if not file.is_file():
        return False
    there = _read(file)[0]
    if different := [n for n, value in run.items() if there.get(n, str(value)) != str(value)]:
        name = different[0].replace("_", " ")
        raise LETError(f"{file} has another {name}; give another --output, or delete it.")
    return True


def save_run(output: Path, run: Run, epochs: Iterable[Run], source: dict[str, str]) -> None:
    """Write the results of each epoch of a run, with what `is_finished` compares and `source`."""
    rows = [{**run, "epoch": number, **epoch} for number, epoch in enumerate(epochs, 1)]
    write_csv(_file(output, run), rows, source)


def load_runs(output: Path) -> list[Rows]:
    """Load all finished runs, ordered by data set, method and seed."""
    return [_read(file) for file in sorted(output.glob("*/*/seed-*.csv"))]


def _file(output: Path, run: Run) -> Path:
    return output / run["data_set"] / run["method"] / f"seed-{run['seed']}.csv"


def _read(file: Path) -> Rows:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def table_rows(runs: Sequence[Rows]) -> list[tuple[str, ...]]:
    """Return a header and Table 2's rows: mean accuracy and range over seeds, in percent.

    A difference is between the two runs of one seed.
    """
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for *_, last in runs:
        of_set = scores.setdefault(last["data_set"], {method: {} for method in METHODS})
        of_set[last["method"]][last["seed"]] = 100 * float(last["test_accuracy"])
    rows: list[tuple[str, ...]] = [("data set", *METHODS.values(), "difference", "seeds")]
    for name, of_set in scores.items():
        baseline, let = of_set.values()
        differences = [let[seed] - baseline[seed] for seed in let if seed in baseline]
        cells = map(_spread, ([*baseline.values()], [*let.values()], differences))
        rows.append((name, *cells, str(len(differences))))
    return rows


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def plot(path: Path, runs: Sequence[Rows]) -> None:
    """Plot test accuracy against epochs: a panel per data set, a line per run."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = [*dict.fromkeys(run[0]["data_set"] for run in runs)]
    figure = Figure(figsize=(5 * len(names), 3.5), layout="constrained")
    panels = dict(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True))
    for run in runs:
        percents = [100 * float(row["test_accuracy"]) for row in run]
        panel, colour = panels[run[0]["data_set"]], f"C{[*METHODS].index(run[0]['method'])}"
        panel.plot(range(1, len(run) + 1), percents, colour, marker="o", markersize=3)
    for name, panel in panels.items():
        panel.set(title=name, xlabel="epoch", ylabel="test accuracy (%)")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.legend([Line2D([], [], color=f"C{i}") for i in range(2)], METHODS.values())
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
