"""DeepSpeed's kernels: compile them before a run, and find locks of killed compilations.

Otherwise every rank compiles them in a run's first step. torch's `FileBaton`
(`torch/utils/file_baton.py`) creates a file `lock` in a kernel's folder, keeps it open while it
compiles, and makes all others wait until the file is gone: after a kill they wait indefinitely.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_let.doctor.check import Check, is_installed
from megatron_let.errors import first_line

# What offload uses; ZeRO without offload uses torch's AdamW.
KERNELS = ("cpu_adam", "async_io")
# Seconds; longer than any of DeepSpeed's kernels takes to compile.
LONGEST_BUILD = 3600.0

LockState = Literal["held", "recent", "stale"]


@dataclass(frozen=True)
class Lock:
    """A kernel's lock.

    Attributes:
        file: the file `lock` in the kernel's folder.
        state: "held" by a process of this machine; "recent" if not, as another machine that shares
            the folder may hold it; or "stale".
    """

    file: Path
    state: LockState

    @property
    def kernel(self) -> str:
        """Return the name of the kernel."""
        return self.file.parent.name

    def describe(self) -> str:
        """Return the lock's state and the recommended action."""
        if self.state == "held":
            return f"{self.kernel} is being compiled by another process"
        removal = {
            "stale": "python -m megatron_let.doctor --build removes it",
            "recent": "delete it unless another machine with this folder is compiling",
        }[self.state]
        return f"{self.file} is left by a killed build, and a run would wait for it: {removal}"


def build_kernels(report: Callable[[str], None]) -> None:
    """Compile each kernel that this machine can compile, into torch's extensions folder.

    Runs find them in `$TORCH_EXTENSIONS_DIR`, else `~/.cache/torch_extensions`.

    Args:
        report: prints one line.
    """
    if not is_installed("deepspeed"):
        report("DeepSpeed is not installed: nothing to build")
        return
    locked = remove_stale_locks(report)
    builders = importlib.import_module("deepspeed.ops.op_builder.all_ops").ALL_OPS
    for name in KERNELS:
        report(f"{name}: {locked.get(name) or _build(builders[name])}")


def remove_stale_locks(report: Callable[[str], None]) -> dict[str, str]:
    """Delete stale locks; return why kernels with a recent lock cannot be built now, by kernel."""
    locks = find_locks()
    for lock in locks:
        if lock.state == "stale":
            lock.file.unlink(missing_ok=True)
            report(f"{lock.kernel}: removed the lock of a killed build")
    return {lock.kernel: lock.describe() for lock in locks if lock.state == "recent"}


def find_locks() -> list[Lock]:
    """Return all locks in torch's extensions folder."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        files = Path(chosen).glob("*/lock")
    else:
        from torch.utils.cpp_extension import get_default_build_root

        # One folder per version of Python and CUDA.
        files = Path(get_default_build_root()).glob("*/*/lock")
    return [Lock(file, _state(file)) for file in sorted(files)]


def check_locks() -> list[Check]:
    """Return a finding per lock that a run would wait for; runs without that kernel start."""
    return [
        Check("kernel build", f"{lock.kernel} is locked", lock.describe())
        for lock in find_locks()
        if lock.state != "held"
    ]


def _build(builder: object) -> str:
    if not builder.is_compatible(verbose=False):  # type: ignore[attr-defined]
        return "cannot be built here"
    start = time.perf_counter()
    try:
        builder.load(verbose=False)  # type: ignore[attr-defined]
    except Exception as error:  # compilers fail in many ways
        return f"was not built ({first_line(error)})"
    return f"ready after {time.perf_counter() - start:.0f} s"


def _state(file: Path) -> LockState:
    if _is_open(file):
        return "held"
    try:
        age = time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return "held"  # it was released in the meantime
    return "stale" if age > LONGEST_BUILD else "recent"


def _is_open(file: Path) -> bool:
    """Return whether a process that this user may inspect has the file open."""
    wanted = str(file.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == wanted:
                return True
        except OSError:
            continue  # closed, or another user's
    return False
