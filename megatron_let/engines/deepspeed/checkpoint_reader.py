"""Read a DeepSpeed checkpoint without DeepSpeed: whole tensors under Megatron's names.

The pickles are read with a list of allowed classes, so no code in them runs. Files are mapped into
memory: a tensor takes memory when it is read.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals

from megatron_let.engines.deepspeed.checkpoint_info import (
    FILE_NAME,
    CheckpointInfo,
    is_universal,
    read_info,
)
from megatron_let.errors import LETError, first_line

# Keys of the state that `checkpoint.universal_info` writes; the names are DeepSpeed's.
_INFO = "universal_checkpoint_info"
_REPLICATED = "tp_replicated_parameter_patterns"
_ROWS = "parameter_with_row_parallelism_patterns"
# Prefix of Megatron's 16-bit wrapper.
_WRAPPER = "module."


class _Ignored:
    """Replaces DeepSpeed's objects in a checkpoint, none of which is used."""

    def __init__(self, *args: Any) -> None:
        pass


_DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def is_zero_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a DeepSpeed checkpoint, in the native or universal format."""
    return (folder / FILE_NAME).is_file() or is_universal(folder)


class ZeroCheckpoint:
    """An `iter_*` folder of the DeepSpeed engine, of any ZeRO stage and tensor parallel size.

    Attributes:
        state: the run's arguments and counters, and how its tensors are sharded.

    Raises:
        LETError: another kind of folder, the universal format, or an incomplete checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / FILE_NAME).is_file() and is_universal(folder):
            raise LETError(
                f"{folder} is in DeepSpeed's universal format, for resuming; give the checkpoint"
                " that it was converted from."
            )
        self.folder, self.info = folder, read_info(folder)
        self.state: Mapping[str, Any] = _load_model(folder, self.info, 0)

    @functools.cached_property
    def _shards(self) -> list[_WholeShard] | list[_FlatShard]:
        """Open one shard per tensor-parallel rank, when the first tensor is read."""
        ranks = range(self.info.tensor_parallel_size)
        if self.info.zero_stage == 3:
            return [_FlatShard(self.folder, self.info, rank) for rank in ranks]
        return [_WholeShard(self.folder, self.info, rank) for rank in ranks]

    @functools.cached_property
    def _stored_names(self) -> dict[str, str]:
        return {name.removeprefix(_WRAPPER): name for name in self._shards[0].shapes}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors by name, without values; each layer has separate names."""
        found = {}
        for name, stored in self._stored_names.items():
            shards = [
                torch.empty(shard.shapes[stored], dtype=shard.dtype(stored), device="meta")
                for shard in self._shards
            ]
            found[name] = merge_shards(stored, shards, self.state)
        return found

    def entries(self) -> list[str]:
        """Return the names of everything saved, without the optimizer."""
        return list(self._stored_names)

    def facts(self) -> dict[str, Any]:
        """Return what `inspect` prints about this format."""
        return {
            "engine": f"deepspeed, ZeRO-{self.info.zero_stage}",
            "optimizer_files": len(list(self.folder.glob("*_optim_states.pt"))),
        }

    def read(self, name: str, index: tuple[int, ...] = ()) -> torch.Tensor:
        """Read one tensor in the model's type; layers are not stacked."""
        assert not index, "each layer has a separate name"
        stored = self._stored_names[name]
        return merge_shards(stored, [shard.read(stored) for shard in self._shards], self.state)


def _load_model(folder: Path, info: CheckpointInfo, rank: int) -> dict[str, Any]:
    """Load the model file of a tensor-parallel rank; under ZeRO-3 of its first replica."""
    replica = "zero_pp_rank_0_" if info.zero_stage == 3 else ""
    return _load(folder / f"{replica}mp_rank_{rank:02d}_model_states.pt")


class _WholeShard:
    """A tensor-parallel rank's part under ZeRO 0 to 2: the model, saved once for all replicas."""

    def __init__(self, folder: Path, info: CheckpointInfo, rank: int) -> None:
        module = _load_model(folder, info, rank)["module"]
        # Older checkpoints of bf16 runs have Transformer Engine's empty entries.
        self._tensors = {name: tensor for name, tensor in module.items() if tensor is not None}
        self.shapes: Mapping[str, torch.Size] = {n: t.shape for n, t in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()


class _FlatShard:
    """A tensor-parallel rank's part under ZeRO-3: each replica stores a piece of each parameter.

    Pieces are fp32 master weights in the order of `param_shapes`, each with
    ceil(elements / replicas) elements (`deepspeed/utils/zero_to_fp32.py`).
    """

    def __init__(self, folder: Path, info: CheckpointInfo, rank: int) -> None:
        state = _load_model(folder, info, rank)
        self._dtype: torch.dtype = state["args"].params_dtype
        self.shapes: Mapping[str, torch.Size] = {
            name: shape for group in state["param_shapes"] for name, shape in group.items()
        }
        self._replicas = [
            _flat_groups(folder, f"zero_pp_rank_{replica}_mp_rank_{rank:02d}")
            for replica in range(info.data_parallel_size)
        ]
        self._offsets, end = {}, 0
        for name, shape in self.shapes.items():
            self._offsets[name] = end
            end += self._piece(shape)
        if any(sum(map(len, groups)) != end for groups in self._replicas):
            raise LETError(f"The shards in {folder} are not of one model; copy it again.")

    def _piece(self, shape: torch.Size) -> int:
        return math.ceil(shape.numel() / len(self._replicas))

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def read(self, name: str) -> torch.Tensor:
        shape, start = self.shapes[name], self._offsets[name]
        end = start + self._piece(shape)
        pieces = [piece for groups in self._replicas for piece in _slices(groups, start, end)]
        whole = torch.cat(pieces)[: shape.numel()].view(shape)
        return whole.to(self._dtype)


def _flat_groups(folder: Path, name: str) -> list[torch.Tensor]:
    """Load one replica's master weights; DeepSpeed puts the precision before the file's name."""
    files = sorted(folder.glob(f"*{name}_optim_states.pt"))
    if len(files) != 1:
        raise LETError(f"The checkpoint {folder} has no {name}_optim_states.pt; copy it again.")
    groups: list[torch.Tensor] = _load(files[0])["optimizer_state_dict"]["fp32_flat_groups"]
    return groups


def _slices(groups: list[torch.Tensor], start: int, end: int) -> list[torch.Tensor]:
    """Return elements `start` to `end` of the concatenated tensors."""
    found, begin = [], 0
    for group in groups:
        found.append(group[max(0, start - begin) : max(0, end - begin)])
        begin += len(group)
    return found


def merge_shards(name: str, shards: list[torch.Tensor], state: Mapping[str, Any]) -> torch.Tensor:
    """Merge the tensor-parallel shards of one parameter.

    Args:
        shards: [rows / tp, columns], or [rows, columns / tp] where the input is split.
    """
    if len(shards) == 1 or _is_listed(name, state[_INFO][_REPLICATED]):
        return shards[0]
    if _is_listed(name, state[_INFO][_ROWS]):
        return torch.cat(shards, dim=1)
    if state["args"].swiglu and ".linear_fc1." in name:
        # Each rank stores its part of the gate above its part of the up projection.
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(shards)


def _is_listed(name: str, patterns: list[str]) -> bool:
    """Return whether a pattern names a parameter, with or without the 16-bit wrapper's prefix."""
    bare = re.escape(name.removeprefix(_WRAPPER))
    return f"^{bare}$" in patterns or f"^{re.escape(_WRAPPER)}{bare}$" in patterns


@functools.cache
def _allowed_classes() -> list[Any]:
    # Megatron has the list of the classes in its arguments; importing it takes seconds.
    from megatron.core.safe_globals import SAFE_GLOBALS

    return [*SAFE_GLOBALS, *((_Ignored, name) for name in _DEEPSPEED_CLASSES)]


def _load(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise LETError(f"The checkpoint {file.parent} has no {file.name}; copy it again.")
    try:
        with safe_globals(_allowed_classes()):
            state: dict[str, Any] = torch.load(
                file, map_location="cpu", weights_only=True, mmap=True
            )
    except Exception as error:  # a damaged pickle can raise any exception
        raise LETError(f"{file} cannot be read safely ({first_line(error)}).") from error
    return state
