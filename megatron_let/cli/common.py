"""Shared by all commands: exit codes, error messages, consoles and quiet imports."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megatron_let.errors import LETError

if TYPE_CHECKING:
    import torch

USAGE_ERROR = 2
INTERRUPTED = 130


def run_command(
    name: str, command: Callable[[Console], int], on_interrupt: str = "interrupted"
) -> int:
    """Run a command's body and turn its errors into one line on stderr and an exit code.

    Args:
        name: printed before an error, as in `plan: error: The recipe ...`.
        command: takes a console on stderr for messages, returns the exit code.

    Returns:
        The command's exit code, 2 after a `LETError`, 130 after Ctrl-C.
    """
    # Megatron and transformers report missing GPU packages when they are imported.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    console = Console(stderr=True)
    try:
        return command(console)
    except LETError as error:
        say(console, f"{name}: error: {error}", "red")
        return USAGE_ERROR
    except KeyboardInterrupt:
        say(console, f"{name}: {on_interrupt}", "red")
        return INTERRUPTED


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace, Console], int], text: str
) -> argparse.ArgumentParser:
    """Add a subcommand that calls `run`; return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def positive(text: str) -> int:
    """Return a flag's value as a number of at least 1; a type of argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def check_output(path: Path) -> None:
    """Check, before any work, that the folder `path` exists or can be made.

    Raises:
        LETError: a part of the path is a file, or may not be written to.
    """
    path = path.absolute()
    # Path.exists raises if a folder above may not be entered.
    existing = next(part for part in (path, *path.parents) if os.path.exists(part))
    if not existing.is_dir():
        raise LETError(f"The output folder {path} cannot be made: {existing} is a file.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise LETError(f"The output folder {path} cannot be written: no permission in {existing}.")


def check_output_file(path: Path) -> None:
    """Check, before any work, that the file `path` can be written, like `check_output`."""
    if os.path.isdir(path):
        raise LETError(f"The output {path} is a folder; give the name of a file.")
    check_output(path.parent)


def say(console: Console, text: str, style: str | None = None, end: str = "\n") -> None:
    """Print a line without wrapping or markup."""
    console.print(text, style=style, end=end, highlight=False, markup=False, soft_wrap=True)


def output_console(width: int = 200) -> Console:
    """Return a console on stdout; a pipe or file gets `width` columns, so tables are not cut."""
    return Console(width=None if sys.stdout.isatty() else width)


def print_table(title: str | None, rows: Iterable[Sequence[object]], width: int = 200) -> None:
    """Print rows, of which the first is the header, on `output_console(width)`."""
    header, *cells = ([str(cell) for cell in row] for row in rows)
    table = Table(*header, title=title)
    for row in cells:
        table.add_row(*row)
    output_console(width).print(table)


def device_of(name: str | None = None) -> torch.device:
    """Return the device of that name, or by default a GPU if there is one, else the CPU.

    Raises:
        LETError: the name is unknown, or this machine has no such device.
    """
    import torch

    # Not torch.cuda, whose shims on a CPU claim a GPU.
    present = torch.accelerator.is_available()
    try:
        device = torch.device(name or ("cuda" if present else "cpu"))
    except RuntimeError as error:
        raise LETError(f"The device {name!r} is unknown; give cpu, cuda or cuda:N.") from error
    if device.type == "cpu":
        return device
    kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    if not present or kind is None or device.type != kind.type or (device.index or 0) >= count:
        names = ", ".join(f"{kind.type}:{i}" for i in range(count)) if kind else ""
        raise LETError(f"This machine has no device {device}; give cpu{names and f', {names}'}.")
    return device


def command_line() -> str:
    """Return the command as the user typed it, for the provenance of a result."""
    program, *arguments = sys.argv
    # The dispatcher sets sys.argv[0] to "megatron-let NAME"; a script was started by Python.
    words = program.split() if program.startswith("megatron-let ") else ["python", program]
    return shlex.join([*words, *arguments])
