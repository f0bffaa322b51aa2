"""Megatron's torch_dist checkpoints, read and written without its model or a process group.

A checkpoint's index (`.metadata`) and its arguments are pickles. Both are read with a list of
allowed classes, so no code in a checkpoint runs. One tensor is held at a time.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_let.checkpoint.parameter_mapping import PROJECTION
from megatron_let.errors import LETError, first_line

COMMON_STATE = "common_state/shard_0_1"
INDEX = ".metadata"
FORMAT = "metadata.json"
# Megatron's file of arguments until 0.18.
_COMMON_FILE = "common.pt"

_OPTIMIZER_PREFIXES = ("optimizer.", "chained_", "opt_param_scheduler")


class _IndexUnpickler(pickle.Unpickler):
    """Allows only the classes that torch.distributed.checkpoint writes into an index."""

    _MODULES = (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.planner",
        "torch.distributed.checkpoint.filesystem",
    )
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("collections", "defaultdict"),
            ("builtins", "dict"),
            ("builtins", "list"),
            ("pathlib", "Path"),
            ("pathlib", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class.

        Raises:
            UnpicklingError: the class is not allowed.
        """
        allowed = (module, name) in self._NAMES
        found = super().find_class(module, name) if allowed or module in self._MODULES else None
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        # A module also has what it imports, such as `os`; only classes defined in it are data.
        if not allowed and not (isinstance(found, type) and found.__module__ == module):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")
        return found


class _SingleTensorPlanner(DefaultLoadPlanner):
    """Loads everything into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._target


class TorchDist:
    """One checkpoint, such as `iter_0007629/`.

    Raises:
        LETError: not a complete torch_dist checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _check_complete(folder)
        self.metadata = _read_index(folder / INDEX)
        self._check_sizes()
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the model's tensors by name, without values.

        The tensors of the optimizer and of a learned projection are left out.
        """
        found = self.metadata.state_dict_metadata.items()
        left_out = (*_OPTIMIZER_PREFIXES, f"{PROJECTION}_")
        return {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in found
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(left_out)
        }

    def entries(self) -> list[str]:
        """Return the names of everything saved, without the optimizer."""
        names = self.metadata.state_dict_metadata
        return [name for name in names if not name.startswith(_OPTIMIZER_PREFIXES)]

    def facts(self) -> dict[str, Any]:
        """Return what `inspect` prints about this format."""
        return {
            "engine": "megatron",
            "let_projection": self.projection_shape(),
            "optimizer_tensors": len(self.metadata.state_dict_metadata) - len(self.entries()),
        }

    def projection_shape(self) -> tuple[int, int] | None:
        """Return (d_T, d_M) of a learned projection; None if there is none."""
        entry = self.metadata.state_dict_metadata.get(f"{PROJECTION}_weight")
        return (entry.size[0], entry.size[1]) if isinstance(entry, TensorStorageMetadata) else None

    def read(self, name: str, index: tuple[int, ...] = ()) -> torch.Tensor:
        """Read one tensor, or one layer or expert of it.

        Args:
            index: index on the first axes, which are removed.

        Raises:
            LETError: the index has only a part of the tensor, or the file is damaged.
        """
        entry = self.metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        inner = entry.size[len(index) :]
        size = torch.Size([1] * len(index) + [*inner])
        start = torch.Size([*index] + [0] * len(inner))
        target = torch.empty(size, dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(offsets=start, sizes=size)
        items = create_read_items_for_chunk_list(name, entry, [wanted])
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise LETError(f"The checkpoint {self.folder} has only a part of {name}.")
        try:
            self._reader.read_data(LoadPlan(items), _SingleTensorPlanner(target)).wait()
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise LETError(
                f"The tensor {name} in {self.folder} is damaged ({first_line(error)}); use another"
                " checkpoint."
            ) from error
        return target.view(inner)

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """Return arguments, iteration and everything else that is not a tensor.

        Raises:
            LETError: there are no arguments, or one is of a class that is not allowed.
        """
        file = self.folder / _COMMON_FILE
        if file.is_file():
            return _load_data(file.read_bytes(), file)
        index = MetadataIndex(COMMON_STATE)
        if index not in self.metadata.storage_data:
            raise LETError(f"The checkpoint {self.folder} has no arguments (no {COMMON_STATE}).")
        place = self.metadata.storage_data[index]
        path = self.folder / place.relative_path
        with path.open("rb") as stream:
            stream.seek(place.offset)
            state = _load_data(stream.read(place.length), path)
        return state[0] if isinstance(state, list) else state

    def _check_sizes(self) -> None:
        """Check that each file has all the bytes that the index names in it."""
        ends: dict[str, int] = {}
        for place in self.metadata.storage_data.values():
            end = place.offset + place.length
            ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
        for name, end in ends.items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < end:
                found = "is missing" if size is None else f"has {size} of {end} bytes"
                raise LETError(f"The checkpoint's file {path} {found}; copy the checkpoint again.")


def is_torch_dist(folder: Path) -> bool:
    """Return whether a folder looks like a torch_dist checkpoint, complete or not."""
    names = (INDEX, FORMAT, _COMMON_FILE)
    return any((folder / n).exists() for n in names) or any(folder.glob("*.distcp"))


def has_index(folder: Path) -> bool:
    """Return whether a folder has the two files that are written last."""
    return (folder / INDEX).is_file() and (folder / FORMAT).is_file()


def _check_complete(folder: Path) -> None:
    """Check that saving the checkpoint has finished.

    Raises:
        LETError: still being written, cut short, or of another format.
    """
    for name in (INDEX, FORMAT):
        if not (folder / name).is_file():
            raise LETError(
                f"The checkpoint {folder} is still being written, or was cut short: it has no"
                f" {name} yet."
            )
    backend = _read_format(folder / FORMAT)
    if backend != "torch_dist":
        raise LETError(
            f"The checkpoint {folder} has the format {backend!r}; save it with --ckpt-format"
            " torch_dist."
        )


def _read_format(path: Path) -> str | None:
    try:
        backend: str | None = json.loads(path.read_text())["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise LETError(f"{path} is damaged ({first_line(error)}).") from error
    return backend


def _read_index(path: Path) -> Metadata:
    try:
        with path.open("rb") as stream:
            metadata = _IndexUnpickler(stream).load()
    except Exception as error:  # a damaged pickle can raise any exception
        raise LETError(f"The index {path} cannot be read ({first_line(error)}).") from error
    if not isinstance(metadata, Metadata):
        raise LETError(f"The index {path} is a {type(metadata).__name__}, not an index.")
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    return metadata


def _load_data(content: bytes, path: Path) -> Any:
    # Megatron has the list of the classes in its checkpoints; importing it takes seconds.
    from megatron.core.safe_globals import SAFE_GLOBALS

    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise LETError(
            f"The arguments in {path} cannot be read safely ({first_line(error)})."
        ) from error


@dataclass(frozen=True)
class Shard:
    """A part of a tensor to write: one layer or expert of a stack, or the whole tensor.

    Attributes:
        size: shape of the whole tensor, with the axes of layers and experts.
        index: index on these axes; empty if there is none.
        read: returns the part, without these axes.
    """

    name: str
    size: tuple[int, ...]
    index: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    def write_item(self) -> WriteItem:
        """Return the part as an item of torch's writer."""
        inner = self.size[len(self.index) :]
        part = (*[1] * len(self.index), *inner)
        start = (*self.index, *[0] * len(inner))
        chunk = ChunkStorageMetadata(offsets=torch.Size(start), sizes=torch.Size(part))
        return WriteItem(
            index=MetadataIndex(self.name, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=chunk,
                properties=TensorProperties(dtype=self.dtype),
                size=torch.Size(self.size),
            ),
        )


class _StreamingPlanner(DefaultSavePlanner):
    """Reads each part when torch's writer asks for it, and keeps none."""

    def __init__(self, shards: Sequence[Shard], objects: Mapping[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        items = [shard.write_item() for shard in shards]
        self._shards = {item.index: shard for item, shard in zip(items, shards, strict=True)}
        self._objects = objects
        self._items = items

    def create_local_plan(self) -> SavePlan:
        objects = [
            WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO)
            for name in self._objects
        ]
        self.plan = SavePlan([*objects, *self._items])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save(self._objects[write_item.index.fqn], buffer)
            return buffer
        shard = self._shards[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        tensor = shard.read().to(shard.dtype)
        whole = tensor[(None,) * len(shard.index)]
        assert write_item.tensor_data is not None
        if whole.shape != write_item.tensor_data.chunk.sizes:
            raise ValueError(f"{shard.name} is {whole.shape}, not {shard.size}")
        return whole.contiguous()


def write_torch_dist(folder: Path, shards: Sequence[Shard], objects: Mapping[str, Any]) -> None:
    """Write a checkpoint in Megatron's `torch_dist` format.

    Args:
        folder: empty or new.
        objects: everything that is not a tensor, by its name in the index.
    """
    save(
        {},
        storage_writer=FileSystemWriter(folder),
        planner=_StreamingPlanner(shards, objects),
        no_dist=True,
    )
    content = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / FORMAT).write_text(json.dumps(content))
