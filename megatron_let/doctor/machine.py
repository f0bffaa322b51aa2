"""All checks of one machine: GPUs, memory, disk and installed packages."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from megatron_let.compat.device import Host
from megatron_let.doctor import packages
from megatron_let.doctor.check import GIB, Check, driver_versions
from megatron_let.doctor.kernels import check_locks
from megatron_let.teacher.precision import default_dtype


def check_machine(host: Host) -> list[Check]:
    """Return all findings about this machine, in the order in which a run needs them."""
    return [
        _python(),
        _torch(),
        *(_gpus() if host.cuda else [_cpu()]),
        Check("teacher", *default_dtype()),
        packages.megatron(),
        packages.patches(host),
        packages.transformer_engine(host),
        packages.apex(host),
        packages.flash_attention(host),
        packages.triton(host),
        packages.deepspeed(),
        *check_locks(),
        packages.resiliency(),
        _memory(),
        _shared_memory(),
        _disk(Path.cwd()),
    ]


def as_json(checks: list[Check]) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {"starts": all(check.ok for check in checks), "checks": [asdict(c) for c in checks]}


def _python() -> Check:
    ok = sys.version_info >= (3, 12)
    path = sys.executable if ok else "install Python 3.12: bash launch/lib/environment.sh"
    return Check("Python", platform.python_version(), path, ok)


def _torch() -> Check:
    ok = Version(torch.__version__) >= Version("2.9")
    built = f"{torch.__version__}, built for CUDA {torch.version.cuda}"
    return Check("torch", built, "" if ok else "install the versions in constraints.txt", ok)


def _gpus() -> Iterator[Check]:
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found = f"{len(gpus)} x {gpus[0].name}, {gpus[0].total_memory / GIB:.0f} GiB"
    driver = (driver_versions() or ["unknown"])[0]
    yield Check("GPUs", f"{found}, driver {driver}", "runs on the GPUs under NCCL")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Check("NCCL", nccl, "settings for a fabric: launch/env/")


def _cpu() -> Check:
    drivers = [] if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else driver_versions()
    if drivers:
        found = f"{len(drivers)}, driver {drivers[0]}, but torch cannot use them"
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        path = f"torch is built for {built}: update the driver, or install a torch built for it"
        return Check("GPUs", found, path, ok=False)
    cores = len(os.sched_getaffinity(0))
    return Check("GPUs", "none", f"runs on the CPU ({cores} cores) under gloo, for small models")


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Check("memory", f"{total:.0f} GiB", "")


def _shared_memory() -> Check:
    free = shutil.disk_usage("/dev/shm").free / GIB if Path("/dev/shm").is_dir() else 0.0
    # NCCL's transport within a node takes most of it.
    use = "for NCCL, data workers and the checkpoint writer"
    path = use if free >= 1 else "too small: mount a larger one"
    return Check("/dev/shm", f"{free:.1f} GiB free", path, free >= 1)


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free / GIB
    path = "a 7B checkpoint takes 88 GiB" if free >= 1 else "free some: logs need space"
    return Check("disk", f"{free:.0f} GiB free in {folder}", path, free >= 1)
