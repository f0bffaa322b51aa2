"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_let.errors import LETError


@contextlib.contextmanager
def whole_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `path`, renamed to it when the block ends without an error.

    Args:
        force: whether an existing folder is replaced, once the new one is whole.

    Raises:
        LETError: something is there already and `force` is not set.
    """
    path = path.absolute()
    if path.exists() and not force:
        raise LETError(f"The output {path} exists; give another one, or --force to replace it.")
    if path.is_file():
        raise LETError(f"The output {path} is a file; give the name of a folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        _replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    path.rename(old)
    partial.rename(path)
    shutil.rmtree(old)
