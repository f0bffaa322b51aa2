"""One finding, and what several of them need."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        found: what is there.
        path: what a run does because of it, or what to do if `ok` is false.
        ok: a run would start, as far as this is concerned.
    """

    name: str
    found: str
    path: str
    ok: bool = True


def version_of(distribution: str) -> str | None:
    """Installed version; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_there(module: str) -> bool:
    """Whether a module can be found; the packages around it are imported, itself is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:
        # Whatever the package around it raises.
        return False


def import_error(module: str) -> str | None:
    """Why a module does not import; None if it does."""
    try:
        importlib.import_module(module)
    except Exception as error:
        # Compiled extensions fail in many ways: a missing symbol, a wrong glibc, an old driver.
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else module}"
    return None


def nvidia_smi(query: str) -> list[str]:
    """One value a GPU.

    Raises:
        OSError, subprocess.SubprocessError: nvidia-smi is not there or fails.
    """
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [line.strip() for line in result.stdout.splitlines()]
