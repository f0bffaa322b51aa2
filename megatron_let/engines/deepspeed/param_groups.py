"""Megatron's parameter groups (weight decay, learning rate multipliers) over ZeRO's parameters."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, _get_param_groups


class _WholeShapes:
    """Stands in for a model: its parameters, each with the shape it has as a layer.

    ZeRO-3 leaves a parameter of shape [0] behind, which Megatron would take for a bias or a norm
    and exempt from weight decay, in silence.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.originals: dict[torch.Tensor, torch.nn.Parameter] = {}
        self._named: list[tuple[str, torch.nn.Parameter]] = []
        for name, parameter in module.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            stand_in = torch.nn.Parameter(
                torch.empty(shape, device="meta"), requires_grad=parameter.requires_grad
            )
            for attribute in ("allreduce", "is_embedding_or_output_parameter"):
                if hasattr(parameter, attribute):
                    setattr(stand_in, attribute, getattr(parameter, attribute))
            self.originals[stand_in] = parameter
            self._named.append((name, stand_in))

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return self._named


def param_groups(
    module: torch.nn.Module, config: OptimizerConfig, overrides: Any
) -> list[dict[str, Any]]:
    """Groups as Megatron's optimizer has them, for `deepspeed.initialize`.

    Args:
        module: the model, partitioned or not.
        config, overrides: from Megatron's `get_megatron_optimizer_config`.
    """
    shapes = _WholeShapes(module)
    groups: list[dict[str, Any]] = _get_param_groups([shapes], config, overrides)
    for group in groups:
        group["params"] = [shapes.originals[stand_in] for stand_in in group["params"]]
    return [group for group in groups if group["params"]]
