"""Applying the patches that a host needs."""

from __future__ import annotations

from importlib.resources import files

from megatron_let.compat import PATCHES, PatchSet
from megatron_let.compat import torch_adam as torch_optimizer
from megatron_let.compat.cpu_shims import CudaDeviceAsCpu, stand_ins
from megatron_let.compat.device import Host


def apply_host_patches(host: Host) -> PatchSet:
    """Apply the patches without which Megatron's loop does not run on this host.

    Returns:
        The applied patches. On a CPU torch calls are redirected for the rest of the process.
    """
    patches = PatchSet()
    if not host.cuda:
        patches.apply_all(PATCHES, stand_ins())
        CudaDeviceAsCpu().__enter__()
    if not files("megatron.core.datasets").joinpath("Makefile").is_file():
        target = "megatron.core.datasets.utils:compile_helpers"
        patches.apply(PATCHES[target], lambda original: lambda: None)
    if _adam_is_torchs():
        patches.apply_all(PATCHES, torch_optimizer.wrappers())
    return patches


def _adam_is_torchs() -> bool:
    from megatron.core.optimizer import distrib_optimizer

    return not distrib_optimizer.HAVE_APEX_OR_TE
