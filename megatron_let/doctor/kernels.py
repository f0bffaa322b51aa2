"""Find locks of killed builds of DeepSpeed's kernels, for which a run would wait indefinitely.

torch's `FileBaton` (`torch/utils/file_baton.py`) creates a file `lock` in a kernel's folder, keeps
it open while it compiles, and makes all others wait until the file is gone.
"""

import os
from pathlib import Path

import psutil

from megatron_let.doctor.check import Check


def check_locks() -> list[Check]:
    """Return a finding per lock that no process here has open; runs without that kernel start."""
    return [
        Check(
            "kernel build",
            f"{lock.parent.name} is locked",
            f"{lock} is left by a killed build, and a run would wait for it: delete it unless"
            " another machine with this folder is compiling",
        )
        for lock in _locks()
        if not _is_open(lock)
    ]


def _locks() -> list[Path]:
    """Return all locks in torch's extensions folder."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return sorted(Path(chosen).glob("*/lock"))
    from torch.utils.cpp_extension import get_default_build_root

    # One folder per version of Python and CUDA.
    return sorted(Path(get_default_build_root()).glob("*/*/lock"))


def _is_open(file: Path) -> bool:
    """Return whether a process that this user may inspect has the file open."""
    return any(
        opened.path == str(file.resolve())
        for process in psutil.process_iter(["open_files"])
        for opened in process.info["open_files"] or ()
    )
