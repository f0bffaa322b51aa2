"""Installed packages, probed one by one, and which path a run takes because of each."""

from __future__ import annotations

import importlib
from pathlib import Path

from packaging.specifiers import SpecifierSet

from megatron_let.compat.device import Host
from megatron_let.doctor.check import Check, import_error, is_there, version_of

# The minor release that constraints.txt pins.
DEEPSPEED_VERSIONS = ">=0.19,<0.20"
# What ZeRO uses, by DeepSpeed's names: Adam on the GPU, offloaded to the host, offloaded to NVMe.
_DEEPSPEED_OPS = ("fused_adam", "cpu_adam", "async_io")

# Of NVIDIA's Apex, built from source: what each part is used for.
_APEX_PARTS = {
    "apex.optimizers": "FusedAdam",
    "amp_C": "fused gradient clipping",
    "fused_weight_gradient_mlp_cuda": "gradient accumulation in the matrix product",
}


def megatron() -> Check:
    """megatron-core is there, in the range of the patches."""
    from megatron_let.compat.patch_table import MEGATRON_VERSIONS

    try:
        info = importlib.import_module("megatron.core.package_info")
    except ImportError as error:
        return Check("Megatron", "missing", f"{error}: install the package megatron-core", False)
    version = str(info.__version__).split("+")[0]
    ok = SpecifierSet(MEGATRON_VERSIONS, prereleases=True).contains(version)
    where = str(Path(str(info.__file__)).parents[2])
    wanted = f"megatron_let needs {MEGATRON_VERSIONS}: install the versions in constraints.txt"
    return Check("Megatron", f"{version} in {where}", "" if ok else wanted, ok)


def patches(host: Host) -> Check:
    """Apply every row that this host needs to itself, which checks target and version."""
    from megatron_let.compat import PATCHES, PatchError, PatchSet
    from megatron_let.compat.cpu_shims import cpu_shims

    rows = [row for row in PATCHES.values() if not host.cuda or row.target not in cpu_shims()]
    problems = []
    for row in rows:
        applied = PatchSet()
        try:
            applied.apply(row, lambda original: original)
        except (PatchError, ImportError) as error:
            problems.append(str(error))
        applied.undo()
    if problems:
        return Check("patches", f"{len(problems)} of {len(rows)} do not fit", problems[0], False)
    return Check("patches", f"all {len(rows)} targets fit", "python -m megatron_let.compat")


def transformer_engine(host: Host) -> Check:
    """Layers and Adam by Transformer Engine, or by torch."""
    version = version_of("transformer_engine")
    if not host.transformer_engine:
        path = "layers by torch: dense models with RMSNorm only"
        return Check("Transformer Engine", version or "none", path)
    problem = import_error("transformer_engine.pytorch")
    if problem:
        path = f"{problem}: build it for this torch, or remove it and layers are torch's"
        return Check("Transformer Engine", "does not import", path, False)
    return Check("Transformer Engine", version or "installed", "layers and FusedAdam")


def apex(host: Host) -> Check:
    """NVIDIA's Apex piece by piece; another project has its name in the package index."""
    name = "NVIDIA Apex"
    if not any(map(is_there, ("apex", *_APEX_PARTS))):
        adam = "Transformer Engine's" if host.transformer_engine else "torch's"
        return Check(name, "none", f"optional: Adam is {adam}")
    if is_there("apex") and not is_there("apex.optimizers"):
        # The entry's layers do not look at apex, but Megatron's own local layers fail with it.
        path = "another project of that name, of no use here: pip uninstall apex"
        return Check(name, f"the wrong apex {version_of('apex') or ''}".strip(), path)
    problems = {module: import_error(module) for module in _APEX_PARTS if is_there(module)}
    broken = [f"{module} does not import ({why})" for module, why in problems.items() if why]
    if broken:
        return Check(name, "broken", f"{broken[0]}: build it for this torch, or remove it", False)
    missing = [use for module, use in _APEX_PARTS.items() if module not in problems]
    path = f"without {', '.join(missing)}" if missing else "all that Megatron uses"
    return Check(name, ", ".join(_APEX_PARTS[module] for module in problems), path)


def flash_attention(host: Host) -> Check:
    """Transformer Engine imports it if it is installed, so a broken one stops a run."""
    name, version = "flash-attn", version_of("flash-attn")
    without = "Transformer Engine's own kernels" if host.transformer_engine else "torch's"
    if not is_there("flash_attn"):
        return Check(name, "none", f"attention by {without}")
    problem = import_error("flash_attn")
    if problem:
        path = f"{problem}: build it for this torch, or remove it"
        return Check(name, "does not import", path, ok=not host.transformer_engine)
    path = "Transformer Engine may choose it" if host.transformer_engine else f"unused: {without}"
    return Check(name, version or "installed", path)


def triton(host: Host) -> Check:
    """The alignment kernel, on a GPU."""
    problem = import_error("triton")
    if problem and host.cuda:
        path = f"{problem}: the alignment kernel needs it; install the version that torch pins"
        return Check("Triton", "does not import", path, False)
    kernel = "alignment by the Triton kernel" if host.cuda else "alignment by the torch reference"
    return Check("Triton", version_of("triton") or "none", kernel)


def deepspeed() -> Check:
    """Its version's range, and which of its kernels this machine has or can compile."""
    name, version = "DeepSpeed", version_of("deepspeed")
    if version is None:
        return Check(name, "none", "optional: Megatron's distributed optimizer does not need it")
    if not SpecifierSet(DEEPSPEED_VERSIONS).contains(version):
        path = f"not in {DEEPSPEED_VERSIONS}: install the version in constraints.txt to use it"
        return Check(name, version, path)
    problem = import_error("deepspeed.ops.op_builder.all_ops")
    if problem:
        return Check(name, f"{version} does not import", problem)
    return Check(name, version, "; ".join(_deepspeed_ops()))


def _deepspeed_ops() -> list[str]:
    builders = importlib.import_module("deepspeed.ops.op_builder.all_ops").ALL_OPS
    built = importlib.import_module("deepspeed.git_version_info").installed_ops
    return [f"{name} {_op_state(builders.get(name), built.get(name))}" for name in _DEEPSPEED_OPS]


def _op_state(builder: object, built: bool | None) -> str:
    if built:
        return "is built"
    compatible = builder is not None and builder.is_compatible(verbose=False)  # type: ignore[attr-defined]
    return "is compiled at first use" if compatible else "cannot be built here"


def resiliency() -> Check:
    """Only its asynchronous checkpoint strategy is of interest."""
    version = version_of("nvidia-resiliency-ext")
    path = "--async-strategy nvrx is possible" if version else "recipes save with mcore's strategy"
    return Check("nvidia-resiliency-ext", version or "none", path)
