"""The precision of the teacher: bf16 where this machine computes it natively."""

from __future__ import annotations

from typing import Literal

import torch


def default_dtype() -> tuple[Literal["bf16", "fp32"], str]:
    """Return the precision that `--let-teacher-dtype auto` selects here, and the reason."""
    # The CPU shims make torch.cuda claim a GPU.
    if torch.accelerator.is_available():
        return "bf16", "the device is a GPU"
    if cpu_has_bf16():
        return "bf16", "this CPU computes bf16 natively"
    return "fp32", "this CPU emulates bf16, several times slower than fp32"


def cpu_has_bf16() -> bool:
    """Return whether torch's matrix products on this CPU use bf16 instructions.

    /proc/cpuinfo does not tell: oneDNN may be limited by ONEDNN_MAX_CPU_ISA. oneDNN alone does not
    tell either: it counts AVX-512 without bf16 instructions as support.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2", "AVX512"):
        instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return supported and instructions
    return supported
