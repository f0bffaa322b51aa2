"""Gradients that tensor-parallel ranks must sum, which Megatron's finalize step does elsewhere."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


def sums_over_tensor_parallel(
    name: str, parameter: torch.nn.Parameter, config: TransformerConfig
) -> bool:
    """Whether each tensor-parallel rank has a part of this parameter's gradient.

    The condition is that of `_allreduce_non_tensor_model_parallel_grads`
    (`megatron/core/distributed/finalize_model_grads.py`), which DeepSpeed's backward bypasses.
    """
    if config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
        return True
    return bool(config.qk_layernorm) and ("q_layernorm" in name or "k_layernorm" in name)


def sum_gradients_over_tensor_parallel(
    module: torch.nn.Module, config: TransformerConfig, group: torch.distributed.ProcessGroup
) -> int:
    """Hook the parameters that need it; their gradients are summed before DeepSpeed sees them.

    Returns:
        Number of parameters hooked.
    """
    if group.size() == 1:
        return 0

    def all_reduce(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    hooked = 0
    for name, parameter in module.named_parameters():
        if sums_over_tensor_parallel(name, parameter, config):
            parameter.register_hook(all_reduce)
            hooked += 1
    return hooked
