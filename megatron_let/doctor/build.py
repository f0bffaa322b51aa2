"""Compiling DeepSpeed's kernels before a run, which would do it in its first step on every rank."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable

from megatron_let.config import first_line
from megatron_let.doctor.check import is_there

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
    builders = importlib.import_module("deepspeed.ops.op_builder.all_ops").ALL_OPS
    for name in KERNELS:
        report(f"{name}: {_build(builders[name])}")


def _build(builder: object) -> str:
    if not builder.is_compatible(verbose=False):  # type: ignore[attr-defined]
        return "cannot be built here"
    start = time.perf_counter()
    try:
        builder.load(verbose=False)  # type: ignore[attr-defined]
    except Exception as error:  # a compiler fails in as many ways as there are compilers
        return f"was not built ({first_line(error)})"
    return f"is there after {time.perf_counter() - start:.0f} s"
