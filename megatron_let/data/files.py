"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_PARTIAL = ".partial"


def partial_path(path: Path) -> Path:
    """The temporary name of a file that is being written."""
    return path.with_name(path.name + _PARTIAL)


def publish(path: Path) -> None:
    """Rename a whole file from its temporary name, once the disk has it."""
    partial = partial_path(path)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all."""
    partial_path(path).write_text(json.dumps(values, indent=2) + "\n")
    publish(path)


def remove_partial(folder: Path) -> None:
    """Remove what a killed run left unfinished."""
    for path in folder.glob("*" + _PARTIAL):
        path.unlink()
