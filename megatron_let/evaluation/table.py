"""Report scores in the form of the paper's Table 1: terminal, CSV, JSON and a plot."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_let.errors import LETError, first_line
from megatron_let.evaluation.harness import ACCURACIES, Result
from megatron_let.evaluation.tasks import Task
from megatron_let.files.atomic import atomic_file, write_json

# Entries of `Row.source` that may differ between rows of one table.
_PER_CALL = ("command", "date", "processor")


@dataclass(frozen=True)
class Row:
    """Scores of one model.

    Attributes:
        tokens: number of tokens it was trained on; None if unknown.
        results: one per task.
        source: settings, versions, command and date.
    """

    model: str
    tokens: int | None
    results: tuple[Result, ...]
    source: dict[str, str] = field(default_factory=dict)

    def score(self, task: Task) -> tuple[float, float]:
        """Return accuracy and standard error of a task, in percent."""
        scores = next(r.scores for r in self.results if r.task == task.name)
        return 100 * scores[task.metric], 100 * scores[f"{task.metric}_stderr"]

    def average(self, tasks: Sequence[Task]) -> tuple[float, float]:
        """Return the mean accuracy over tasks and its standard error, in percent.

        The tasks count as independent.
        """
        scores = [self.score(task) for task in tasks]
        error = math.sqrt(sum(e**2 for _, e in scores)) / len(scores)
        return sum(value for value, _ in scores) / len(scores), error

    def conditions(self) -> tuple[set[str], dict[str, str]]:
        """Return what rows of one table have in common: the tasks, the settings and versions."""
        common = {key: value for key, value in self.source.items() if key not in _PER_CALL}
        return {result.task for result in self.results}, common


def terminal_rows(rows: Sequence[Row], tasks: Sequence[Task]) -> Iterator[tuple[str, ...]]:
    """Yield the header and the rows of the table for the terminal, with standard errors."""
    yield "model", *(task.column for task in tasks), "Avg."
    for row in rows:
        cells = [row.score(task) for task in tasks] + [row.average(tasks)]
        yield row.model, *(f"{value:.1f}±{error:.1f}" for value, error in cells)


def csv_rows(rows: Sequence[Row], tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Return one line per model, task and metric, and one per model for the average.

    Each line ends with the entries of its row's `source`.
    """
    lines = []
    for row in rows:
        for result in row.results:
            about = {"items": result.items, "task_version": result.task_version}
            for metric in filter(result.scores.__contains__, ACCURACIES):
                percent, error = (100 * result.scores[k] for k in (metric, f"{metric}_stderr"))
                lines.append(_line(row, result.task, metric, percent, error) | about | row.source)
        lines.append(_line(row, "average", "", *row.average(tasks)) | row.source)
    return lines


def _line(row: Row, task: str, metric: str, percent: float, error: float) -> dict[str, Any]:
    return {
        "model": row.model,
        "tokens": row.tokens,
        "task": task,
        "metric": metric,
        "percent": round(percent, 3),
        "stderr": round(error, 3),
        "items": "",
        "task_version": "",
    }


def write_results_json(
    path: Path, rows: Sequence[Row], tasks: Sequence[Task], source: dict[str, Any]
) -> None:
    """Write all scores, with one answer per item, after the entries of `source`."""
    models = []
    for row in rows:
        average, error = row.average(tasks)
        models.append(asdict(row) | {"average": average, "average_stderr": error})
    write_json(path, source | {"models": models})


def read_results_json(path: Path) -> list[Row]:
    """Return the rows that `write_results_json` wrote; none if the file does not exist.

    Raises:
        LETError: the file has another form.
    """
    if not path.exists():
        return []
    try:
        return [
            Row(
                model["model"],
                model["tokens"],
                tuple(Result(**result) for result in model["results"]),
                model.get("source", {}),
            )
            for model in json.loads(path.read_text())["models"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LETError(
            f"The file {path} is not a table of scores ({first_line(error)}); move it away, or give"
            " another --output."
        ) from error


def plot_average(path: Path, rows: Sequence[Row], tasks: Sequence[Task]) -> bool:
    """Plot the average accuracy against tokens; return False if fewer than two models have any."""
    # Keyed by run: the checkpoint's name without its iteration.
    runs: dict[str, list[Row]] = {}
    for row in rows:
        if row.tokens:
            runs.setdefault(re.sub(r"/?iter_\d+$", "", row.model), []).append(row)
    if sum(map(len, runs.values())) < 2:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, members in sorted(runs.items()):
        members.sort(key=lambda row: row.tokens or 0)
        values = [row.average(tasks) for row in members]
        axes.errorbar(
            [(row.tokens or 0) / 1e9 for row in members],
            [value for value, _ in values],
            yerr=[error for _, error in values],
            marker="o",
            capsize=3,
            label=name,
        )
    axes.set(xlabel="tokens seen (billions)", ylabel=f"average accuracy of {len(tasks)} tasks (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix("."))
    return True
