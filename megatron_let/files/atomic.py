"""Write files and folders by atomic replace."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_let.errors import LETError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and replace `path` with it if the block ends without an error.

    The folder of `path` is made if it does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name for all processes, so that what a killed one left is replaced.
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def atomic_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to `path` if the block ends without an error.

    Args:
        force: replace an existing folder, once the new one is complete.

    Raises:
        LETError: `path` exists and `force` is not set.
    """
    path = path.absolute()
    if path.exists() and not force:
        raise LETError(f"The output {path} exists; give another one, or --force to replace it.")
    if path.is_file():
        raise LETError(f"The output {path} is a file; give the name of a folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    # A killed process of the same id may have left one.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_separate(output: Path, *read: Path | None) -> None:
    """Check that writing, and with --force replacing, `output` deletes nothing that is read.

    Args:
        read: files and folders; None is skipped.

    Raises:
        LETError: the output is one of them, contains one, or is a file or folder in one.
    """
    target = output.resolve()
    for path in filter(None, read):
        source = path.resolve()
        if target == source:
            relation = "is"
        elif target in source.parents:
            relation = "contains"
        elif source in target.parents and target.exists():
            relation = "is a part of"
        else:
            continue
        raise LETError(f"The output {output} {relation} the input {path}; give another output.")


def replace_folder(partial: Path, path: Path) -> None:
    """Rename a finished folder to `path`, and delete the one that was there."""
    # A killed process may have left one.
    for old in path.parent.glob(f".{glob.escape(path.name)}.old-*"):
        shutil.rmtree(old, ignore_errors=True)
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
