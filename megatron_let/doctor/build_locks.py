"""Locks that a killed compilation of a kernel has left, on which every later run waits for ever.

torch's `FileBaton` (`torch/utils/file_baton.py`) makes a file `lock` in a kernel's folder, keeps it
open while it compiles, and lets all others wait until the file is gone.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_let.doctor.check import Check

# Longer than any of DeepSpeed's kernels takes, in seconds; another node may be at it.
LONGEST_BUILD = 3600.0

LockState = Literal["held", "recent", "stale"]


@dataclass(frozen=True)
class Lock:
    """A kernel's lock.

    Attributes:
        file: named `lock`, in the kernel's folder.
        state: held by a process of this machine; recent, and of no process here, so that another
            machine with the same folder may hold it; or stale.
    """

    file: Path
    state: LockState

    @property
    def kernel(self) -> str:
        """Name of the kernel."""
        return self.file.parent.name

    def describe(self) -> str:
        """What it means and what to do."""
        if self.state == "held":
            return f"{self.kernel} is being compiled by another process"
        removal = {
            "stale": "python -m megatron_let.doctor --build removes it",
            "recent": "delete it unless another machine with this folder is compiling",
        }[self.state]
        return f"{self.file} is of a build that was killed, and a run would wait for it: {removal}"


def find_locks() -> list[Lock]:
    """All locks in torch's folder of extensions."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        files = Path(chosen).glob("*/lock")
    else:
        from torch.utils.cpp_extension import get_default_build_root

        # One folder for each version of Python and CUDA.
        files = Path(get_default_build_root()).glob("*/*/lock")
    return [Lock(file, _state(file)) for file in sorted(files)]


def _state(file: Path) -> LockState:
    if _is_open(file):
        return "held"
    try:
        age = time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return "held"  # it was, and went while we looked
    return "stale" if age > LONGEST_BUILD else "recent"


def _is_open(file: Path) -> bool:
    """Whether a process that this user may look into has a file open."""
    wanted = str(file.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == wanted:
                return True
        except OSError:
            continue  # closed, or another user's
    return False


def check_locks() -> list[Check]:
    """A finding for each lock that a run would wait for; runs without that kernel start."""
    return [
        Check("kernel build", f"{lock.kernel} is locked", lock.describe())
        for lock in find_locks()
        if lock.state != "held"
    ]
