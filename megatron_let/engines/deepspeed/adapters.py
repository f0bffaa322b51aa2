"""Adapters from Megatron's model to `deepspeed.initialize`."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig, _get_param_groups
from megatron.core.transformer.transformer_config import TransformerConfig

_EXTRA_STATE = "_extra_state"


class ModelParallelUnit:
    """Megatron's process groups under the names of DeepSpeed's `mpu`.

    It must not have `initialize_sequence_parallel`, by which DeepSpeed takes an mpu for its own
    Ulysses groups (`deepspeed/utils/groups.py`).
    """

    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Return the global ranks of this rank's data-parallel group."""
        return torch.distributed.get_process_group_ranks(parallel_state.get_data_parallel_group())

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Return 1: pipelines are not supported."""
        return 1

    def get_data_parallel_src_rank(self) -> int:
        """Return the global rank of the first replica."""
        return self.get_data_parallel_group_ranks()[0]


class _WholeShapes:
    """A model's parameters, each replaced by a meta tensor of its unpartitioned shape.

    ZeRO-3 leaves a parameter of shape [0] behind, which Megatron would take for a bias or a norm
    and silently exempt from weight decay.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.originals: dict[torch.Tensor, torch.nn.Parameter] = {}
        self._named: list[tuple[str, torch.nn.Parameter]] = []
        for name, parameter in module.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            whole = torch.nn.Parameter(
                torch.empty(shape, device="meta"), requires_grad=parameter.requires_grad
            )
            for attribute in ("allreduce", "is_embedding_or_output_parameter"):
                if hasattr(parameter, attribute):
                    setattr(whole, attribute, getattr(parameter, attribute))
            self.originals[whole] = parameter
            self._named.append((name, whole))

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return self._named


def param_groups(
    module: torch.nn.Module, config: OptimizerConfig, overrides: Any
) -> list[dict[str, Any]]:
    """Return Megatron's parameter groups (weight decay, learning rate multipliers).

    Args:
        config, overrides: result of Megatron's `get_megatron_optimizer_config`.
    """
    shapes = _WholeShapes(module)
    groups: list[dict[str, Any]] = _get_param_groups([shapes], config, overrides)
    for group in groups:
        group["params"] = [shapes.originals[whole] for whole in group["params"]]
    return [group for group in groups if group["params"]]


def sum_gradients_over_tensor_parallel(
    module: torch.nn.Module, config: TransformerConfig, group: torch.distributed.ProcessGroup
) -> None:
    """Add hooks to parameters whose gradient is partial on each tensor-parallel rank.

    Megatron's finalize step sums them, which DeepSpeed's backward bypasses; the hooks sum them
    before DeepSpeed reduces them.
    """
    if group.size() == 1:
        return

    def all_reduce(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    for name, parameter in module.named_parameters():
        if _is_summed_over_tensor_parallel(name, parameter, config):
            parameter.register_hook(all_reduce)


def _is_summed_over_tensor_parallel(
    name: str, parameter: torch.nn.Parameter, config: TransformerConfig
) -> bool:
    """Return whether Megatron's `_allreduce_non_tensor_model_parallel_grads` reduces this gradient.

    See `megatron/core/distributed/finalize_model_grads.py`.
    """
    if config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
        return True
    return bool(config.qk_layernorm) and ("q_layernorm" in name or "k_layernorm" in name)


def drop_empty_extra_states(module: torch.nn.Module) -> None:
    """Drop extra states of None on saving, on which `ds_to_universal` fails; restore them on load.

    Megatron's linear layers have such entries for compatibility with Transformer Engine's.
    """
    module.register_state_dict_post_hook(_drop)
    module.register_load_state_dict_pre_hook(_restore)


def _drop(module: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    empty = [n for n, value in state_dict.items() if n.endswith(_EXTRA_STATE) and value is None]
    for name in empty:
        del state_dict[name]


def _restore(
    module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any
) -> None:
    for name, child in module.named_modules(prefix=prefix.removesuffix(".")):
        if type(child).get_extra_state is not torch.nn.Module.get_extra_state:
            state_dict.setdefault(f"{name}.{_EXTRA_STATE}", None)
