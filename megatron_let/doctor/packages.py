"""Check the installed packages and the code path that each one enables."""

import importlib
from pathlib import Path

from packaging.specifiers import SpecifierSet

from megatron_let.compat.device import Host
from megatron_let.doctor.check import Check, import_error, is_installed, version_of
from megatron_let.run import restarts_in_job

# The minor release that constraints.txt pins.
DEEPSPEED_VERSIONS = ">=0.19,<0.20"
# ZeRO's kernels, by DeepSpeed's names: Adam on the GPU, on the host, offload to NVMe.
_DEEPSPEED_OPS = ("fused_adam", "cpu_adam", "async_io")

# Parts of NVIDIA's Apex, built from source, and their use.
_APEX_PARTS = {
    "apex.optimizers": "FusedAdam",
    "amp_C": "fused gradient clipping",
    "fused_weight_gradient_mlp_cuda": "gradient accumulation in the matrix product",
}


def megatron() -> Check:
    """Check that megatron-core is installed in the range of the patches."""
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
    """Apply each patch of this host as an identity, which checks its target and version."""
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
    """Check whether layers and Adam are Transformer Engine's or torch's."""
    version = version_of("transformer_engine")
    if not host.transformer_engine:
        path = "layers by torch: RMSNorm only, experts one after another"
        return Check("Transformer Engine", version or "none", path)
    problem = import_error("transformer_engine.pytorch")
    if problem:
        path = f"{problem}: build it for this torch, or remove it to use torch's layers"
        return Check("Transformer Engine", "does not import", path, False)
    return Check("Transformer Engine", version or "installed", "layers and FusedAdam")


def apex(host: Host) -> Check:
    """Check each part of NVIDIA's Apex; the package index has another project of its name."""
    name = "NVIDIA Apex"
    if not any(map(is_installed, ("apex", *_APEX_PARTS))):
        adam = "Transformer Engine's" if host.transformer_engine else "torch's"
        return Check(name, "none", f"optional: Adam is {adam}")
    if is_installed("apex") and not is_installed("apex.optimizers"):
        # This package's layers do not import apex, but Megatron's local layers fail with it.
        path = "another project of that name, unused: pip uninstall apex"
        return Check(name, f"the wrong apex {version_of('apex') or ''}".strip(), path)
    problems = {module: import_error(module) for module in _APEX_PARTS if is_installed(module)}
    broken = [f"{module} does not import ({why})" for module, why in problems.items() if why]
    if broken:
        return Check(name, "broken", f"{broken[0]}: build it for this torch, or remove it", False)
    missing = [use for module, use in _APEX_PARTS.items() if module not in problems]
    path = f"without {', '.join(missing)}" if missing else "all parts that Megatron uses"
    return Check(name, ", ".join(_APEX_PARTS[module] for module in problems), path)


def flash_attention(host: Host) -> Check:
    """Check flash-attn: Transformer Engine imports it, so a broken one fails a run."""
    name, version = "flash-attn", version_of("flash-attn")
    without = "Transformer Engine's own kernels" if host.transformer_engine else "torch's"
    if not is_installed("flash_attn"):
        return Check(name, "none", f"attention by {without}")
    problem = import_error("flash_attn")
    if problem:
        path = f"{problem}: build it for this torch, or remove it"
        return Check(name, "does not import", path, ok=not host.transformer_engine)
    path = "Transformer Engine may choose it" if host.transformer_engine else f"unused: {without}"
    return Check(name, version or "installed", path)


def triton(host: Host) -> Check:
    """Check Triton, which the alignment kernel needs on a GPU."""
    problem = import_error("triton")
    if problem and host.cuda:
        path = f"{problem}: the alignment kernel needs it; install the version that torch pins"
        return Check("Triton", "does not import", path, False)
    kernel = "alignment by the Triton kernel" if host.cuda else "alignment by the torch reference"
    return Check("Triton", version_of("triton") or "none", kernel)


def deepspeed() -> Check:
    """Check DeepSpeed's version and which of its kernels are built or can be compiled."""
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
    """Check for nvidia-resiliency-ext, which restarts ranks within a job."""
    version = version_of(restarts_in_job.DISTRIBUTION)
    if version is None:
        path = "launch/ starts ranks with torchrun; recipes save with mcore's strategy"
    elif restarts_in_job.has_ft_launcher():
        path = "LET_RESTARTS_IN_JOB uses its ft_launcher; --async-strategy nvrx is possible"
    else:
        path = f"older than {restarts_in_job.OLDEST}: launch/ starts ranks with torchrun"
    return Check(restarts_in_job.DISTRIBUTION, version or "none", path)
