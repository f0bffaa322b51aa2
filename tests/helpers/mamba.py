"""The entry with Mamba's kernels in torch, as mamba-ssm has none for a CPU: the recurrence itself.

run_ranks("tests.helpers.mamba", flags of the entry, ...)
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm import mamba_mixer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_let.pretrain import main


class GroupNorm(torch.nn.Module):
    """RMSNorm over groups of features, [..., d] to the same shape; Megatron's ExtendedRMSNorm."""

    def __init__(self, width: int, eps: float, group_size: int, dtype: Any, **unused: Any) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        groups = hidden.unflatten(-1, (-1, self.group_size))
        return F.rms_norm(groups, groups.shape[-1:], eps=self.eps).flatten(-2) * self.weight

    def sharded_state_dict(self, prefix: str, sharded_offsets: Any, metadata: Any) -> Any:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {"weight": 0}, sharded_offsets,
            tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip


def scan(
    packed: Tensor, kernel: Tensor, kernel_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
    headdim: int, ngroups: int, **unused: Any,
) -> Tensor:  # fmt: skip
    """Return `[b, l, heads * headdim]` of Mamba 2's state space, one token at a time.

    Args:
        packed: `[b, l, ...]` of z, x, B, C and dt.
        kernel: `[channels, width]` of the causal convolution over x, B and C.
    """
    heads = len(D)
    inner, width = heads * headdim, kernel.shape[1]
    both = packed.shape[-1] - 2 * inner - heads
    z, xBC, dt = packed.split([inner, inner + both, heads], -1)
    xBC = F.pad(xBC.transpose(1, 2), (width - 1, 0))
    xBC = F.silu(F.conv1d(xBC, kernel[:, None], kernel_bias, groups=len(kernel))).transpose(1, 2)
    x, B, C = xBC.split([inner, both // 2, both // 2], -1)
    x = x.unflatten(-1, (heads, headdim))
    B, C = (t.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, 2) for t in (B, C))
    dt = F.softplus(dt + dt_bias)
    decay, added = torch.exp(dt * A), torch.einsum("blh,blhp,blhn->blhpn", dt, x, B)
    state, outputs = torch.zeros_like(added[:, 0]), []
    for token in range(x.shape[1]):
        state = decay[:, token, :, None, None] * state + added[:, token]
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, token]))
    return (torch.stack(outputs, 1) + D[:, None] * x).flatten(-2) * F.silu(z)


if __name__ == "__main__":
    package = ModuleType("mamba_ssm")
    package.__spec__ = ModuleSpec("mamba_ssm", None)
    sys.modules["mamba_ssm"] = package
    mamba_mixer.HAVE_MAMBA_SSM = True
    mamba_mixer.ExtendedRMSNorm = GroupNorm
    mamba_mixer.mamba_split_conv1d_scan_combined = scan
    sys.exit(main())
