"""Compiling DeepSpeed's kernels before a run, which would do it in its first step on every rank."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable

from megatron_let.doctor.build_locks import find_locks
from megatron_let.doctor.check import is_there
from megatron_let.errors import first_line

# What offload uses; ZeRO without it steps torch's own AdamW.
KERNELS = ("cpu_adam", "async_io")


def build_kernels(report: Callable[[str], None]) -> None:
    """Compile each kernel that this machine can, into torch's folder of extensions.

    Runs find them in `$TORCH_EXTENSIONS_DIR`, else `~/.cache/torch_extensions`.

    Args:
        report: prints one line.
    """
    if not is_there("deepspeed"):
        report("DeepSpeed is not installed: nothing to build")
        return
    recent = _remove_stale_locks(report)
    builders = importlib.import_module("deepspeed.ops.op_builder.all_ops").ALL_OPS
    for name in KERNELS:
        report(f"{name}: {recent.get(name) or _build(builders[name])}")


def _remove_stale_locks(report: Callable[[str], None]) -> dict[str, str]:
    """Delete what killed builds have left; return why the other kernels cannot be built now."""
    locks = find_locks()
    for lock in locks:
        if lock.state == "stale":
            lock.file.unlink(missing_ok=True)
            report(f"{lock.kernel}: the lock of a killed build is removed")
    return {lock.kernel: lock.describe() for lock in locks if lock.state == "recent"}


def _build(builder: object) -> str:
    if not builder.is_compatible(verbose=False):  # type: ignore[attr-defined]
        return "cannot be built here"
    start = time.perf_counter()
    try:
        builder.load(verbose=False)  # type: ignore[attr-defined]
    except Exception as error:  # a compiler fails in as many ways as there are compilers
        return f"was not built ({first_line(error)})"
    return f"is there after {time.perf_counter() - start:.0f} s"
