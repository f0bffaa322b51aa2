"""The weights in a DeepSpeed checkpoint, whole and under Megatron's names; read without DeepSpeed.

Its pickles are read with a list of the classes that belong there, so no code in them is run. Files
are mapped, not read: a tensor takes memory when it is asked for.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch.serialization import safe_globals

from megatron_let.engines.deepspeed.checkpoint_info import FILE_NAME, CheckpointInfo, read_info
from megatron_let.errors import LETError, first_line

# Keys of the state that `checkpoint.universal_info` writes, in DeepSpeed's words.
_INFO = "universal_checkpoint_info"
_REPLICATED = "tp_replicated_parameter_patterns"
_ROWS = "parameter_with_row_parallelism_patterns"
# Prefix of Megatron's 16-bit wrapper.
_WRAPPER = "module."


class _Unused:
    """Stands in for DeepSpeed's own objects in a checkpoint, none of which is looked at."""

    def __init__(self, *args: Any) -> None:
        pass


_DEEPSPEEDS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def is_zero_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of the DeepSpeed engine, in its own or universal format."""
    return (folder / FILE_NAME).is_file() or (folder / "zero").is_dir()


def read_state(folder: Path) -> Mapping[str, Any]:
    """The arguments and counters of a checkpoint's run, without its tensors.

    Raises:
        LETError: there are none, or they are damaged.
    """
    info = read_info(folder)
    return _load(folder / _model_file(info, 0))


class ZeroCheckpoint:
    """An `iter_*` folder of the DeepSpeed engine, of any ZeRO stage and tensor parallel size.

    Attributes:
        folder: where it lies.
        info: its layout.
        state: the run's arguments and counters, and how its tensors are sharded.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            LETError: it is no such folder, in the universal format, or not whole.
        """
        if not (folder / FILE_NAME).is_file() and (folder / "zero").is_dir():
            raise LETError(
                f"{folder} is in DeepSpeed's universal format, for resuming; give the checkpoint"
                " that it was converted from."
            )
        self.folder, self.info = folder, read_info(folder)
        open_shard = _FlatShard if self.info.zero_stage == 3 else _WholeShard
        ranks = range(self.info.tensor_parallel_size)
        self._shards: list[_Shard] = [open_shard(folder, self.info, rank) for rank in ranks]
        self.state: Mapping[str, Any] = self._shards[0].state
        self._stored = {name.removeprefix(_WRAPPER): name for name in self._shards[0].shapes}

    def tensors(self) -> Mapping[str, Any]:
        """Name -> size and type; a name for each layer."""
        return {
            name: SimpleNamespace(
                size=self._size(stored),
                properties=SimpleNamespace(dtype=self._shards[0].dtype(stored)),
            )
            for name, stored in self._stored.items()
        }

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        """One tensor in the model's type; layers are not stacked."""
        assert layer is None, "each layer has a name of its own"
        stored = self._stored[name]
        return merge_shards(stored, [shard.read(stored) for shard in self._shards], self.state)

    def _size(self, stored: str) -> torch.Size:
        sizes = [torch.empty(shard.shapes[stored], device="meta") for shard in self._shards]
        return merge_shards(stored, sizes, self.state).shape


def _model_file(info: CheckpointInfo, rank: int) -> str:
    """DeepSpeed's name of what a tensor-parallel rank, or its first replica, saved."""
    replica = "zero_pp_rank_0_" if info.zero_stage == 3 else ""
    return f"{replica}mp_rank_{rank:02d}_model_states.pt"


class _Shard(Protocol):
    """One tensor-parallel rank's part of the model."""

    state: Mapping[str, Any]
    shapes: Mapping[str, torch.Size]

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> torch.Tensor: ...


class _WholeShard:
    """Of ZeRO 0 to 2, whose replicas save the model once."""

    def __init__(self, folder: Path, info: CheckpointInfo, rank: int) -> None:
        self.state: Mapping[str, Any] = _load(folder / _model_file(info, rank))
        # Checkpoints of bf16 runs used to have Transformer Engine's empty entries.
        self._tensors = {
            name: tensor for name, tensor in self.state["module"].items() if tensor is not None
        }
        self.shapes: Mapping[str, torch.Size] = {
            name: tensor.shape for name, tensor in self._tensors.items()
        }

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()


class _FlatShard:
    """Of ZeRO-3: each replica holds a piece of each parameter, one behind the other, in fp32.

    The order is that of `param_shapes`; a piece is ceil(elements / replicas) long
    (`deepspeed/utils/zero_to_fp32.py`).
    """

    def __init__(self, folder: Path, info: CheckpointInfo, rank: int) -> None:
        self.state: Mapping[str, Any] = _load(folder / _model_file(info, rank))
        self.shapes: Mapping[str, torch.Size] = {
            name: s for group in self.state["param_shapes"] for name, s in group.items()
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
        found: torch.dtype = self.state["args"].params_dtype
        return found

    def read(self, name: str) -> torch.Tensor:
        shape, start = self.shapes[name], self._offsets[name]
        end = start + self._piece(shape)
        pieces = [piece for groups in self._replicas for piece in _slices(groups, start, end)]
        whole = torch.cat(pieces)[: shape.numel()].view(shape)
        return whole.to(self.dtype(name))


def _flat_groups(folder: Path, name: str) -> list[torch.Tensor]:
    """One replica's masters; DeepSpeed puts the precision before the file's name."""
    files = sorted(folder.glob(f"*{name}_optim_states.pt"))
    if len(files) != 1:
        raise LETError(f"The checkpoint {folder} has no {name}_optim_states.pt; copy it again.")
    groups: list[torch.Tensor] = _load(files[0])["optimizer_state_dict"]["fp32_flat_groups"]
    return groups


def _slices(groups: list[torch.Tensor], start: int, end: int) -> list[torch.Tensor]:
    """Elements `start` to `end` of tensors laid end to end."""
    found, begin = [], 0
    for group in groups:
        found.append(group[max(0, start - begin) : max(0, end - begin)])
        begin += len(group)
    return found


def merge_shards(name: str, shards: list[torch.Tensor], state: Mapping[str, Any]) -> torch.Tensor:
    """Join one parameter's tensor-parallel shards.

    Args:
        name: as in the checkpoint.
        shards: [rows / tp, columns], or [rows, columns / tp] where the input is split.
        state: of the checkpoint.
    """
    if len(shards) == 1 or _is_listed(name, state[_INFO][_REPLICATED]):
        return shards[0]
    if _is_listed(name, state[_INFO][_ROWS]):
        return torch.cat(shards, dim=1)
    if state["args"].swiglu and ".linear_fc1." in name:
        # Each rank holds its part of the gate above its part of the up-projection.
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(shards)


def _is_listed(name: str, patterns: list[str]) -> bool:
    """Whether a parameter is named; Megatron's 16-bit wrapper leaves its prefix out on saving."""
    bare = re.escape(name.removeprefix(_WRAPPER))
    return f"^{bare}$" in patterns or f"^{re.escape(_WRAPPER)}{bare}$" in patterns


@functools.cache
def _allowed() -> list[Any]:
    # Megatron keeps the list of what its arguments hold; importing it takes seconds.
    from megatron.core.safe_globals import SAFE_GLOBALS

    return [*SAFE_GLOBALS, *((_Unused, name) for name in _DEEPSPEEDS)]


def _load(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise LETError(f"The checkpoint {file.parent} has no {file.name}; copy it again.")
    try:
        with safe_globals(_allowed()):
            state: dict[str, Any] = torch.load(
                file, map_location="cpu", weights_only=True, mmap=True
            )
    except Exception as error:  # a damaged file raises whatever its bytes happen to mean
        raise LETError(f"{file} cannot be read safely ({first_line(error)}).") from error
    return state
