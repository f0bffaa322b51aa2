"""The weights in a DeepSpeed checkpoint, whole and under Megatron's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_let.config import LETError, first_line
from megatron_let.engines.deepspeed.checkpoint_info import CheckpointInfo, read_info

# Keys of the state that `checkpoint.universal_info` writes, in DeepSpeed's words.
_INFO = "universal_checkpoint_info"
_REPLICATED = "tp_replicated_parameter_patterns"
_ROWS = "parameter_with_row_parallelism_patterns"


def read_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """Read an `iter_*` folder of the DeepSpeed engine; its pickles can run code.

    Returns:
        Tensors under the model's names (a layer each) in the model's type, and the run's state with
        its arguments.

    Raises:
        LETError: it is no such folder, is damaged, or ZeRO-3 with tensor parallel.
    """
    info = read_info(folder)
    if info.zero_stage == 3:
        return _read_stage_3(folder, info)
    states = [
        _load(folder / f"mp_rank_{rank:02d}_model_states.pt")
        for rank in range(info.tensor_parallel_size)
    ]
    merged = {
        name: merge_shards(name, [state["module"][name] for state in states], states[0])
        for name in states[0]["module"]
    }
    return _without_wrapper(merged), states[0]


def merge_shards(name: str, shards: list[torch.Tensor], state: Mapping[str, Any]) -> torch.Tensor:
    """Join one parameter's tensor-parallel shards.

    Args:
        name: as in the checkpoint.
        shards: [rows / tp, columns], or [rows, columns / tp] where the input is split.
        state: of the checkpoint.
    """
    patterns, escaped = state[_INFO], f"^{re.escape(name)}$"
    if len(shards) == 1 or escaped in patterns[_REPLICATED]:
        return shards[0]
    if escaped in patterns[_ROWS]:
        return torch.cat(shards, dim=1)
    if state["args"].swiglu and ".linear_fc1." in name:
        # Each rank holds its part of the gate above its part of the up-projection.
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(shards)


def _read_stage_3(
    folder: Path, info: CheckpointInfo
) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if info.tensor_parallel_size > 1:
        raise LETError(
            f"The checkpoint {folder} is of ZeRO-3 with tensor parallel size"
            f" {info.tensor_parallel_size}, which DeepSpeed cannot merge; export one of ZeRO-2."
        )
    state = _load(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    weights = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    dtype = state["args"].params_dtype
    return _without_wrapper({n: tensor.to(dtype) for n, tensor in weights.items()}), state


def _without_wrapper(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take the prefix of Megatron's 16-bit wrapper off."""
    return {name.removeprefix("module."): tensor.detach() for name, tensor in tensors.items()}


def _load(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise LETError(f"{file} cannot be read ({first_line(error)}).") from error
    return state
