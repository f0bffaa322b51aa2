"""One look at this machine: what is installed, and which path a run takes because of it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from megatron_let.host.device import Host

GIB = 2**30

# Of NVIDIA's Apex, built from source: what each part is used for.
_APEX_PARTS = {
    "apex.optimizers": "FusedAdam",
    "amp_C": "fused gradient clipping",
    "fused_weight_gradient_mlp_cuda": "gradient accumulation in the matrix product",
}


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


def check_machine(host: Host) -> list[Check]:
    """All findings about this machine, in the order in which a run needs them."""
    return [
        _python(),
        _torch(),
        *(_gpus() if host.cuda else [_cpu()]),
        _megatron(),
        _patches(host),
        _transformer_engine(host),
        _apex(host),
        _optional("flash-attn", "flash_attn", "Transformer Engine's attention may choose it",
                  "attention by Transformer Engine's own kernels or torch's"),
        _triton(host),
        _optional("deepspeed", "deepspeed", "ZeRO runs are possible", "not needed for Megatron's"),
        _optional("nvidia-resiliency-ext", "nvidia_resiliency_ext",
                  "--async-strategy nvrx is possible", "recipes save with --async-strategy mcore"),
        _memory(),
        _shared_memory(),
        _disk(Path.cwd()),
    ]  # fmt: skip


def as_json(checks: list[Check]) -> dict[str, Any]:
    """What `--json` prints."""
    return {"starts": all(check.ok for check in checks), "checks": [asdict(c) for c in checks]}


def version_of(distribution: str) -> str | None:
    """Installed version; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Check:
    ok = sys.version_info >= (3, 12)
    path = sys.executable if ok else "Python 3.12 is needed: launch/lib/environment.sh"
    return Check("Python", platform.python_version(), path, ok)


def _torch() -> Check:
    import torch

    ok = Version(torch.__version__) >= Version("2.9")
    built = f"{torch.__version__}, built for CUDA {torch.version.cuda}"
    return Check("torch", built, "" if ok else "install the versions in constraints.txt", ok)


def _gpus() -> Iterator[Check]:
    import torch

    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found = f"{len(names)} x {names[0].name}, {names[0].total_memory / GIB:.0f} GiB"
    yield Check("GPUs", f"{found}, driver {_driver()}", "runs on the GPUs under NCCL")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Check("NCCL", nccl, "settings for a fabric: launch/env/")


def _driver() -> str:
    try:
        return nvidia_smi("driver_version")[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def nvidia_smi(query: str) -> list[str]:
    """One value a GPU.

    Raises:
        OSError, subprocess.SubprocessError: nvidia-smi is not there or fails.
    """
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [line.strip() for line in result.stdout.splitlines()]


def _cpu() -> Check:
    import torch

    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return Check("GPUs", "a driver, but torch is built without CUDA", "runs on the CPU, slowly")
    cores = len(os.sched_getaffinity(0))
    return Check("GPUs", "none", f"runs on the CPU ({cores} cores) under gloo, for small models")


def _megatron() -> Check:
    from packaging.specifiers import SpecifierSet

    from megatron_let.patches.table import MEGATRON_VERSIONS

    try:
        info = importlib.import_module("megatron.core.package_info")
    except ImportError as error:
        return Check("Megatron", "missing", f"{error}: install the package megatron-core", False)
    version = str(info.__version__).split("+")[0]
    ok = SpecifierSet(MEGATRON_VERSIONS, prereleases=True).contains(version)
    where = str(Path(str(info.__file__)).parents[2])
    wanted = f"megatron_let needs {MEGATRON_VERSIONS}: install the versions in constraints.txt"
    return Check("Megatron", f"{version} in {where}", "" if ok else wanted, ok)


def _patches(host: Host) -> Check:
    """Apply every row that this host needs to itself, which checks target and version."""
    from megatron_let.host.cpu import stand_ins
    from megatron_let.patches import PATCHES, PatchError, PatchSet

    rows = [row for row in PATCHES.values() if not host.cuda or row.target not in stand_ins()]
    problems = []
    for row in rows:
        patches = PatchSet()
        try:
            patches.apply(row, lambda original: original)
        except (PatchError, ImportError) as error:
            problems.append(str(error))
        patches.undo()
    if problems:
        return Check("patches", f"{len(problems)} of {len(rows)} do not fit", problems[0], False)
    return Check("patches", f"all {len(rows)} targets fit", "python -m megatron_let.patches")


def _transformer_engine(host: Host) -> Check:
    if not host.transformer_engine:
        path = "layers by torch: dense models with RMSNorm only"
        return Check("Transformer Engine", version_of("transformer_engine") or "none", path)
    problem = _import_error("transformer_engine.pytorch")
    if problem:
        path = f"{problem}: build it for this torch, or remove it and layers are torch's"
        return Check("Transformer Engine", "does not import", path, False)
    version = version_of("transformer_engine") or "installed"
    return Check("Transformer Engine", version, "layers and FusedAdam")


def _apex(host: Host) -> Check:
    parts = [use for module, use in _APEX_PARTS.items() if _is_there(module)]
    if importlib.util.find_spec("apex") is None:
        adam = "Transformer Engine's" if host.transformer_engine else "torch's"
        return Check("NVIDIA Apex", "none", f"optional: Adam is {adam}")
    if not _is_there("apex.optimizers"):
        # The entry's layers do not look at apex, but Megatron's own local layers fail with it.
        path = "another project of that name, of no use here: pip uninstall apex"
        return Check("NVIDIA Apex", f"the wrong apex {version_of('apex') or ''}".strip(), path)
    missing = [use for use in _APEX_PARTS.values() if use not in parts]
    path = f"without {', '.join(missing)}" if missing else "all that Megatron uses"
    return Check("NVIDIA Apex", ", ".join(parts), path)


def _triton(host: Host) -> Check:
    problem = _import_error("triton")
    if problem and host.cuda:
        path = f"{problem}: the alignment kernel needs it; install the version that torch pins"
        return Check("Triton", "does not import", path, False)
    kernel = "alignment by the Triton kernel" if host.cuda else "alignment by the torch reference"
    return Check("Triton", version_of("triton") or "none", kernel)


def _optional(distribution: str, module: str, with_it: str, without: str) -> Check:
    there = importlib.util.find_spec(module) is not None
    found = version_of(distribution) or "installed" if there else "none"
    return Check(distribution, found, with_it if there else without)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:
        # Compiled extensions fail in many ways: a missing symbol, a wrong glibc, an old driver.
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else module}"
    return None


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Check("memory", f"{total:.0f} GiB", "")


def _shared_memory() -> Check:
    free = shutil.disk_usage("/dev/shm").free / GIB if Path("/dev/shm").is_dir() else 0.0
    ok = free >= 0.25
    path = "for data workers and the checkpoint writer" if ok else "too small: mount more of it"
    return Check("/dev/shm", f"{free:.1f} GiB free", path, ok)


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free / GIB
    ok = free >= 1
    path = "a 7B checkpoint takes 88 GiB" if ok else "free some: not even logs have space here"
    return Check("disk", f"{free:.0f} GiB free in {folder}", path, ok)
