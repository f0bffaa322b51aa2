"""Compare runs with their baseline: a table, pictures and one HTML page.

    python tools/compare_runs.py runs/baseline runs/let --out comparison
    python tools/compare_runs.py baseline=a/seed1 baseline=a/seed2 let=b/seed1 let=b/seed2 --out DIR

A RUN is a folder with metrics.jsonl (and optionally checkpoints/run.json and
evaluation/results.json) or the metrics file itself. Runs of one NAME are seeds of one variant.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_let.cli.common import (
    check_output,
    command_line,
    output_console,
    print_table,
    run_command,
    say,
)
from megatron_let.files.names import METRICS
from megatron_let.metrics.compare import (
    ComparedRun,
    check_variants,
    compare,
    find_baseline,
    load_run,
)


def main(argv: list[str] | None = None) -> int:
    """Compare the runs; return the exit code."""
    given = _parser().parse_args(argv)
    return run_command("compare", lambda console: _compare(given))


def _compare(given: argparse.Namespace) -> int:
    check_output(given.out)
    runs = [_load(text) for text in given.runs]
    check_variants(runs)
    report(runs, given.baseline, given.out, given.title, command_line())
    return 0


def report(
    runs: list[ComparedRun],
    baseline: str | None,
    out: Path,
    title: str,
    command: str,
    remarks: Sequence[str] = (),
) -> None:
    """Print the tables, and write the page, the pictures and the CSV files.

    Args:
        baseline: name of the baseline; None selects the one without a teacher.
        command: the command that made the report, for the provenance.

    Raises:
        LETError: there is no baseline.
    """
    # matplotlib takes a second to import, which an error or --help need not wait for.
    from megatron_let.metrics import report as reports
    from megatron_let.metrics.provenance import provenance

    variants = compare(runs, find_baseline(runs, baseline))
    console = output_console()
    if pair := reports.two_runs(variants):
        print_table("held-out loss", reports.step_rows(*pair))
    # One column per variant: a row of all figures is wider than a terminal.
    print_table(title, zip(reports.COLUMNS, *reports.table_rows(variants), strict=True))
    for note in (*reports.notes(variants), *remarks):
        say(console, f"- {note}")
    for path in reports.write_comparison(out, title, variants, provenance(command), remarks):
        say(console, f"written: {path}")


def _load(text: str) -> ComparedRun:
    name, separator, path = text.partition("=")
    if separator and "/" not in name:
        return load_run(name, Path(path))
    run = Path(text).resolve()
    return load_run(run.parent.name if run.name == METRICS else run.name, Path(text))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="+", metavar="[NAME=]RUN", help="folder of a run, or a metrics file")
    add("--out", type=Path, required=True, help="folder to write to")
    add("--baseline", metavar="NAME", help="default: the one without a teacher")
    add("--title", default="Runs compared", help="title of the page")
    return parser
