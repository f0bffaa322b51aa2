"""Apply the patches that a host needs."""

from __future__ import annotations

from importlib.resources import files

from megatron_let.compat import PatchSet, checkpoint_writer, torch_adam
from megatron_let.compat.cpu_shims import CudaDeviceAsCpu, cpu_shims
from megatron_let.compat.device import Host


def apply_host_patches(host: Host) -> PatchSet:
    """Apply the patches that Megatron's training loop needs on this host.

    On a CPU, torch calls are redirected for the rest of the process.
    """
    patches = PatchSet()
    if not host.cuda:
        patches.apply_all(cpu_shims())
        CudaDeviceAsCpu().__enter__()
    if not files("megatron.core.datasets").joinpath("Makefile").is_file():
        compile_helpers = "megatron.core.datasets.utils:compile_helpers"
        patches.apply_all({compile_helpers: lambda original: lambda: None})
    # Imported after the shims, which Megatron's modules see when they are imported.
    from megatron.core.optimizer import distrib_optimizer

    patches.apply_all(checkpoint_writer.wrappers())
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        patches.apply_all(torch_adam.wrappers())
    return patches
