"""A finding of the doctor, and the probes that several checks share."""

import importlib
import importlib.metadata
import importlib.util
import subprocess
from dataclasses import dataclass

from megatron_let.errors import first_line

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        path: the code path that a run takes, or the fix if `ok` is false.
        ok: this finding does not prevent a run.
    """

    name: str
    found: str
    path: str
    ok: bool = True


def version_of(distribution: str) -> str | None:
    """Return the installed version; None if the distribution is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_installed(module: str) -> bool:
    """Return whether a module can be found; imports its parent packages but not the module."""
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # raised by a parent package
        return False


def import_error(module: str) -> str | None:
    """Return why a module does not import; None if it does."""
    try:
        importlib.import_module(module)
    except Exception as error:  # compiled extensions fail in many ways
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def nvidia_smi(query: str) -> list[str]:
    """Return the value of `query` for each GPU; OSError or SubprocessError if nvidia-smi fails."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [line.strip() for line in result.stdout.splitlines()]


def driver_versions() -> list[str]:
    """Return the driver version of each GPU; nothing if nvidia-smi is missing or fails."""
    try:
        return nvidia_smi("driver_version")
    except (OSError, subprocess.SubprocessError):
        return []
