"""Load a model on one rank and broadcast it, so that a job reads its files once."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_let.errors import LETError

# Largest message; parameters are sent in place, in parts of this size.
_PART_BYTES = 2**28


def load_on_first_rank(
    load: Callable[[], Any], device: torch.device, group: torch.distributed.ProcessGroup | None
) -> Any:
    """Return the model that `load` loads, on the device of every rank of a group.

    Only the group's first rank calls `load`. The others never hold the model in host memory: they
    receive the modules without values, and then the values of parameters and buffers.

    Args:
        load: loads a model in host memory.
        group: ranks that call this together; None for this rank alone.

    Raises:
        LETError: `load` raised it; every rank of the group raises it then.
    """
    if group is None or group.size() == 1:
        return load().to(device)
    model: Any = None
    message: list[Any] = [None]
    if group.rank() == 0:
        try:
            model = load().to(device)
            message = [_without_values(model, torch.device("meta"))]
        except LETError as error:
            message = [error]
    torch.distributed.broadcast_object_list(message, group=group, group_src=0)
    if isinstance(message[0], LETError):
        raise message[0]
    if model is None:
        model = _without_values(message[0], device)
    for tensor in _tensors(model):
        _broadcast(tensor, group)
    return model


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Return parameters and buffers in the order of the modules, tied ones once."""
    return itertools.chain(model.parameters(), model.buffers())


def _without_values(model: torch.nn.Module, device: torch.device) -> Any:
    """Return a copy of a model whose parameters and buffers are uninitialised, on a device."""
    # deepcopy takes from this dict what it would copy, so tied weights stay tied.
    copies: dict[int, Any] = {}
    for tensor in _tensors(model):
        empty = torch.empty_like(tensor, device=device, memory_format=torch.contiguous_format)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        copies[id(tensor)] = torch.nn.Parameter(empty, False) if is_parameter else empty
    return copy.deepcopy(model, copies)


def _broadcast(tensor: torch.Tensor, group: torch.distributed.ProcessGroup) -> None:
    # Bytes, because a backend need not know the type.
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for part in data.split(_PART_BYTES):
        torch.distributed.broadcast(part, group=group, group_src=0)
