"""The folder for converted and downloaded teachers, and the lock that ranks share in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_let.errors import LETError


def default_cache() -> Path:
    """Return the cache folder.

    It is `$MEGATRON_LET_CACHE`, else `$XDG_CACHE_HOME/megatron_let`, else `~/.cache/megatron_let`.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MEGATRON_LET_CACHE") or Path(base) / "megatron_let")


def teachers_cache() -> Path:
    """Return the folder of converted teachers and their locks; `exclusive_lock` creates it."""
    return default_cache() / "teachers"


@contextlib.contextmanager
def exclusive_lock(path: Path, variable: str) -> Iterator[None]:
    """Hold a lock file, which is created with its folder if needed.

    Args:
        variable: environment variable with which the user moves the folder.

    Raises:
        LETError: the file cannot be created or locked.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise LETError(
                f"The cache folder {path.parent} cannot be created or locked ({error.strerror});"
                f" set {variable} to a writable folder."
            ) from error
        yield
