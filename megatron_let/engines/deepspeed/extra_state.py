"""Keep Transformer Engine's empty extra states out of checkpoints."""

from __future__ import annotations

from typing import Any

import torch

_SUFFIX = "_extra_state"


def leave_out_empty_extra_states(module: torch.nn.Module) -> None:
    """Drop entries of None on saving, on which `ds_to_universal` fails; put them back on loading.

    Megatron's linear layers have such an entry for the sake of Transformer Engine's.
    """
    module.register_state_dict_post_hook(_drop)
    module.register_load_state_dict_pre_hook(_put_back)


def _drop(module: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name, value in state_dict.items() if _is_empty(name, value)]:
        del state_dict[name]


def _is_empty(name: str, value: Any) -> bool:
    return name.endswith(_SUFFIX) and value is None


def _put_back(
    module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any
) -> None:
    for name, child in module.named_modules(prefix=prefix.removesuffix(".")):
        if type(child).get_extra_state is not torch.nn.Module.get_extra_state:
            state_dict.setdefault(f"{name}.{_SUFFIX}", None)
