"""Resume Megatron's distributed optimizer over torch's Adam.

Without Transformer Engine and Apex the step counter is a tensor in each parameter's state, which
0.19.2 does not expect when it loads a checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer."


def wrap_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `state_dict`: a new optimizer, before it has loaded a checkpoint, is at step 0."""

    @functools.wraps(original)
    def state_dict(self: Any) -> Any:
        if self.optimizer.state:
            return original(self)
        inner = self.optimizer.state_dict()
        groups = [
            {name: value for name, value in group.items() if name != "params"} | {"step": 0.0}
            for group in inner["param_groups"]
        ]
        state = {"optimizer": {"param_groups": groups}}
        return state | ({"grad_scaler": self.grad_scaler.state_dict()} if self.grad_scaler else {})

    return state_dict


def wrap_load_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `load_state_dict`: each parameter continues from the saved step."""

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        # In fp32 the optimizer's parameters are views of the model's and are written in place.
        with torch.no_grad():
            original(self, state_dict)
        step = float(state_dict["optimizer"]["param_groups"][0]["step"])
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(step)

    return load_state_dict


def wrap_set_states(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_set_main_param_and_optimizer_states`: a checkpoint has no step per parameter."""

    @functools.wraps(original)
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # None is skipped; `load_state_dict` has set the step.
        original(self, model_param, {"step": None, **tensors})

    return set_states


def wrappers() -> dict[str, Callable[[Any], Any]]:
    """Return {patch target: wrapper} for hosts on which Adam is torch's."""
    return {
        _OPTIMIZER + "state_dict": wrap_state_dict,
        _OPTIMIZER + "load_state_dict": wrap_load_state_dict,
        _OPTIMIZER + "_set_main_param_and_optimizer_states": wrap_set_states,
    }
