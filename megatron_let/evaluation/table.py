"""Scores as the paper's Table 1: on the terminal, as CSV, JSON and a plot."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_let.evaluation.harness import Result
from megatron_let.evaluation.tasks import Task
from megatron_let.files.atomic import partial_path, replace_from_partial, write_json


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        tokens: that it was trained on, where known.
    """

    model: str
    tokens: int | None
    results: tuple[Result, ...]

    def score(self, task: Task) -> tuple[float, float]:
        """Accuracy and standard error of a task, in percent."""
        scores = next(r.scores for r in self.results if r.task == task.name)
        return 100 * scores[task.metric], 100 * scores[f"{task.metric}_stderr"]

    def average(self, tasks: Sequence[Task]) -> tuple[float, float]:
        """Mean accuracy over tasks, in percent, and its standard error from the tasks' own."""
        scores = [self.score(task) for task in tasks]
        error = math.sqrt(sum(e**2 for _, e in scores)) / len(scores)
        return sum(value for value, _ in scores) / len(scores), error


def terminal_table(rows: Sequence[Row], tasks: Sequence[Task], title: str) -> Table:
    """The table, with standard errors."""
    table = Table("model", *(task.column for task in tasks), "Avg.", title=title)
    for row in rows:
        cells = [row.score(task) for task in tasks] + [row.average(tasks)]
        table.add_row(row.model, *(f"{value:.1f}±{error:.1f}" for value, error in cells))
    return table


def csv_rows(rows: Sequence[Row], tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """One line a model, task and metric, and one a model's average."""
    lines = []
    for row in rows:
        lines += [line for result in row.results for line in _lines(row, result)]
        average, error = row.average(tasks)
        lines.append(_line(row, "average", "", average, error))
    return lines


def _lines(row: Row, result: Result) -> list[dict[str, Any]]:
    return [
        _line(
            row,
            result.task,
            metric,
            100 * result.scores[metric],
            100 * result.scores[f"{metric}_stderr"],
            result.items,
            result.task_version,
        )
        for metric in ("acc", "acc_norm")
        if metric in result.scores
    ]


def _line(
    row: Row,
    task: str,
    metric: str,
    percent: float,
    error: float,
    items: int | str = "",
    version: str = "",
) -> dict[str, Any]:
    return {
        "model": row.model,
        "tokens": row.tokens,
        "task": task,
        "metric": metric,
        "percent": round(percent, 3),
        "stderr": round(error, 3),
        "items": items,
        "task_version": version,
    }


def write_results_json(
    path: Path, rows: Sequence[Row], tasks: Sequence[Task], source: dict[str, Any]
) -> None:
    """Everything, with each item's answer."""
    models = []
    for row in rows:
        average, error = row.average(tasks)
        models.append(asdict(row) | {"average": average, "average_stderr": error})
    write_json(path, source | {"models": models})


def plot_average(path: Path, rows: Sequence[Row], tasks: Sequence[Task]) -> bool:
    """Average accuracy against tokens seen, where two models or more say how many.

    Returns:
        Whether there was anything to plot.
    """
    # By run: what stands before the iteration in a checkpoint's name.
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
    figure.savefig(partial_path(path), format=path.suffix.removeprefix("."))
    replace_from_partial(path)
    return True
