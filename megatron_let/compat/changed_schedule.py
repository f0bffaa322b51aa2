"""Change the learning rate of a run that is resumed with `--override-opt-param-scheduler`.

Megatron 0.19.2 finds a parameter group of a checkpoint by its schedule, and would take the old
rate from it: with another `--lr` the optimizer cannot be loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core.optimizer.optimizer import param_group_identifier_keys

_OPTIMIZER = "megatron.core.optimizer.optimizer:MegatronOptimizer."
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer."
_SCHEDULE = ("max_lr", "min_lr", "start_wd", "end_wd")
_OTHER_KEYS = [key for key in param_group_identifier_keys if key not in _SCHEDULE]

Groups = list[dict[str, Any]]


def with_current_schedule(current: Groups, saved: Groups) -> Groups:
    """Return the saved groups with the schedule of the current group that is otherwise equal.

    Groups that several current ones fit are returned as they are.
    """

    def identity(group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(group.get(key, group.get(f"pre_{key}")) for key in _OTHER_KEYS)

    changed = []
    for group in saved:
        fitting = [ours for ours in current if identity(ours) == identity(group)]
        ours = fitting[0] if len(fitting) == 1 else {}
        changed.append(group | {key: ours[key] for key in _SCHEDULE if key in ours})
    return changed


def _wrap_filter(original: Callable[[Groups, Groups], Groups]) -> Any:
    def filter_and_reorder(current_groups: Groups, state_dict_groups: Groups) -> Groups:
        return original(current_groups, with_current_schedule(current_groups, state_dict_groups))

    return staticmethod(functools.wraps(original)(filter_and_reorder))


def _wrap_load(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> Any:
        loaded = state_dict["optimizer"]
        groups = with_current_schedule(self.optimizer.param_groups, loaded["param_groups"])
        return original(self, state_dict | {"optimizer": loaded | {"param_groups": groups}})

    return load_state_dict


def wrappers() -> dict[str, Callable[[Any], Any]]:
    """Return {patch target: wrapper} for a run with `--override-opt-param-scheduler`."""
    return {
        _OPTIMIZER + "_filter_and_reorder_param_groups": _wrap_filter,
        _DISTRIBUTED + "load_state_dict": _wrap_load,
    }
