"""Runs compared with their baseline: a table, pictures and one HTML page.

    python tools/compare_runs.py runs/baseline runs/let --out comparison
    python tools/compare_runs.py baseline=a/seed1 baseline=a/seed2 let=b/seed1 let=b/seed2 --out DIR

A RUN is a folder with metrics.jsonl (and checkpoints/run.json, evaluation/results.json where there
are any) or the metrics file itself; runs of one NAME are seeds of one line.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_let.errors import LETError
from megatron_let.metrics.compare import ComparedRun, compare, find_baseline, load_run


def main(argv: list[str] | None = None) -> int:
    """Compare; return the exit code."""
    given = _parser().parse_args(argv)
    try:
        runs = [_load(text) for text in given.runs]
        report(runs, given.baseline, given.out, given.title)
    except LETError as error:
        print(f"compare_runs: error: {error}", file=sys.stderr)
        return 2
    return 0


def report(runs: list[ComparedRun], baseline: str | None, out: Path, title: str) -> None:
    """Print the table and write the page, the pictures and the tables.

    Raises:
        LETError: there is no baseline.
    """
    from megatron_let.metrics.provenance import provenance
    from megatron_let.metrics.report import COLUMNS, notes, table_rows, write_comparison

    name = find_baseline(runs, baseline)
    lines = compare(runs, name)
    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(*COLUMNS, title=title)
    for row in table_rows(lines):
        table.add_row(*row)
    console.print(table)
    for note in notes(lines, name):
        console.print(f"- {note}", highlight=False, soft_wrap=True)
    source = provenance(shlex.join(["python", *sys.argv]))
    for path in write_comparison(out, title, lines, name, source):
        console.print(f"written: {path}", soft_wrap=True)


def _load(text: str) -> ComparedRun:
    name, separator, path = text.partition("=")
    if separator and "/" not in name:
        return load_run(name, Path(path))
    return load_run(Path(text).resolve().name, Path(text))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="+", metavar="[NAME=]RUN", help="folder of a run, or a metrics file")
    add("--out", type=Path, required=True, help="folder to write to")
    add("--baseline", metavar="NAME", help="default: the one without a teacher")
    add("--title", default="Runs compared", help="of the page")
    return parser


if __name__ == "__main__":
    sys.exit(main())
