"""The folder for converted and downloaded teachers, and the lock that ranks share in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


def default_cache() -> Path:
    """Return the cache folder.

    It is `$MEGATRON_LET_CACHE`, else `$XDG_CACHE_HOME/megatron_let`, else `~/.cache/megatron_let`.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MEGATRON_LET_CACHE") or Path(base) / "megatron_let")


def teachers_cache() -> Path:
    """Return the folder of converted teachers and of locks, creating it if needed."""
    folder = default_cache() / "teachers"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def exclusive_lock(name: str) -> Iterator[TextIO]:
    """Hold `NAME.lock` in the cache; yield it open for reading and appending."""
    with (teachers_cache() / f"{name}.lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file
