"""Report what this machine can run and how; exit code 0 only if a run would start."""

import argparse
import contextlib
import json
import logging
import sys
import warnings

from rich.console import Console
from rich.table import Table

from megatron_let.doctor.check import Check


def main(argv: list[str] | None = None) -> int:
    """Check this machine and print the findings; return 0 if a run would start."""
    parser = argparse.ArgumentParser(prog="python -m megatron_let.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    # Packages that print when imported must not print into the JSON, nor between the findings.
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(sys.stderr):
        # These import torch and Megatron, for which --help need not wait.
        from megatron_let.compat.device import detect_host, prepare_process
        from megatron_let.doctor.machine import as_json, check_machine

        host = detect_host()
        prepare_process(host, 0)
        checks = check_machine(host)
    if arguments.json:
        print(json.dumps(as_json(checks), indent=2))
    else:
        _print_table(checks)
    return 0 if all(check.ok for check in checks) else 1


def _print_table(checks: list[Check]) -> None:
    table = Table("", "", "found", "result", box=None)
    for check in checks:
        mark = "[green]ok[/]" if check.ok else "[red]no[/]"
        table.add_row(mark, check.name, check.found, check.path)
    console = Console()
    console.print(table)
    problems = [check.name for check in checks if not check.ok]
    console.print(
        f"No run would start here: see {', '.join(problems)}." if problems else "A run would start."
    )


if __name__ == "__main__":
    sys.exit(main())
