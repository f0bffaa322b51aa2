"""Programs that a test puts before the machine's own ones."""

from __future__ import annotations

import os
from pathlib import Path


def write_program(path: Path, *lines: str) -> str:
    """Write a bash program; return a PATH that finds it first."""
    path.write_text("\n".join(("#!/bin/bash", *lines, "")))
    path.chmod(0o755)
    return f"{path.parent}:{os.environ['PATH']}"
