"""Megatron's torch_dist checkpoints, read without Megatron's model, a GPU or a process group.

A checkpoint's index (`.metadata`) and its arguments are pickles. Both are read with a list of
classes that may appear in them, so that no code in a checkpoint is run.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_let.checkpoint.parameter_mapping import PROJECTION
from megatron_let.errors import LETError, first_line
from megatron_let.files.names import TRACKER, checkpoint_name

COMMON_STATE = "common_state/shard_0_1"
INDEX = ".metadata"
FORMAT = "metadata.json"
# Where Megatron kept the arguments until 0.18.
COMMON_FILE = "common.pt"

_OPTIMIZER_PREFIXES = ("optimizer.", "chained_", "opt_param_scheduler")


class _IndexUnpickler(pickle.Unpickler):
    """Reads what torch.distributed.checkpoint puts into an index, and nothing else."""

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
        """Refuse every class but the index's own."""
        allowed = (module, name) in self._NAMES
        found = super().find_class(module, name) if allowed or module in self._MODULES else None
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        # A module also holds what it imports, such as `os`; only its own classes are data.
        if not allowed and not (isinstance(found, type) and found.__module__ == module):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
        return found


class _Into(DefaultLoadPlanner):
    """Puts everything that is read into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._target


class TorchDist:
    """One checkpoint, such as `iter_0007629/`.

    Attributes:
        folder: where it lies.
        metadata: its index.

    Raises:
        LETError: not a whole torch_dist checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        check_whole(folder)
        self.metadata = _read_index(folder / INDEX)
        self._check_sizes()
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """The model's tensors by name; the optimizer's and a projection's are left out."""
        found = self.metadata.state_dict_metadata.items()
        left_out = (*_OPTIMIZER_PREFIXES, f"{PROJECTION}_")
        return {
            name: entry
            for name, entry in found
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(left_out)
        }

    def projection_shape(self) -> tuple[int, int] | None:
        """(d_T, d_M) of a learned projection; None where there is none."""
        entry = self.metadata.state_dict_metadata.get(f"{PROJECTION}_weight")
        return (entry.size[0], entry.size[1]) if isinstance(entry, TensorStorageMetadata) else None

    def optimizer_names(self) -> list[str]:
        """Names of the optimizer's tensors."""
        names = self.metadata.state_dict_metadata
        return [name for name in names if name.startswith(_OPTIMIZER_PREFIXES)]

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        """Read one tensor, or one layer of it.

        Args:
            layer: index on the first axis, which is taken away.

        Raises:
            LETError: the index does not cover it all, or the file is damaged.
        """
        entry = self.metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        size = entry.size if layer is None else torch.Size([1, *entry.size[1:]])
        start = torch.Size([layer or 0, *[0] * (len(size) - 1)])
        target = torch.empty(size, dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(offsets=start, sizes=size)
        items = create_read_items_for_chunk_list(name, entry, [wanted])
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise LETError(f"The checkpoint {self.folder} holds only a part of {name}.")
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise LETError(
                f"The tensor {name} in {self.folder} is damaged ({first_line(error)}); take another"
                " checkpoint."
            ) from error
        return target if layer is None else target[0]

    def common_state(self) -> dict[str, Any]:
        """Arguments, iteration and all else that is not a tensor.

        Raises:
            LETError: it holds an object of a class that Megatron does not put there.
        """
        file = self.folder / COMMON_FILE
        if file.is_file():
            return _load_data(file.read_bytes(), file)
        index = MetadataIndex(COMMON_STATE)
        if index not in self.metadata.storage_data:
            raise LETError(f"The checkpoint {self.folder} holds no arguments (no {COMMON_STATE}).")
        place = self.metadata.storage_data[index]
        path = self.folder / place.relative_path
        with path.open("rb") as stream:
            stream.seek(place.offset)
            state = _load_data(stream.read(place.length), path)
        return state[0] if isinstance(state, list) else state

    def _check_sizes(self) -> None:
        """Compare each file's length with the last byte that the index names in it."""
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


def iteration_folder(path: Path) -> Path:
    """The checkpoint in a run's folder, its last one, or the folder itself if it is one.

    Raises:
        LETError: there is none.
    """
    if not path.is_dir():
        raise LETError(f"The checkpoint {path} does not exist.")
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    content = tracker.read_text().strip()
    name = checkpoint_name(int(content)) if content.isdecimal() else content
    if not (path / name).is_dir():
        raise LETError(f"{tracker} says {content!r}, but {path / name} does not exist.")
    return path / name


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a Megatron checkpoint, whole or not."""
    names = (INDEX, FORMAT, COMMON_FILE, TRACKER)
    return any((folder / n).exists() for n in names) or any(folder.glob("*.distcp"))


def legacy_files(folder: Path) -> list[Path]:
    """The pickles of a checkpoint in Megatron's `torch` format, one a rank."""
    return sorted(folder.glob("mp_rank_*/*.pt"))


def check_whole(folder: Path) -> None:
    """Check that a torch_dist checkpoint was finished.

    Raises:
        LETError: still being written, cut short, or of another format.
    """
    if legacy_files(folder):
        raise LETError(
            f"The checkpoint {folder} is in Megatron's old format, pickles that can run code when"
            " they are opened; if you know who wrote it, add --trust."
        )
    if not (folder / INDEX).is_file() or not (folder / FORMAT).is_file():
        if any(folder.glob("*.distcp")):
            missing = INDEX if not (folder / INDEX).is_file() else FORMAT
            raise LETError(
                f"The checkpoint {folder} is still being written, or was cut short: it has no"
                f" {missing} yet."
            )
        raise LETError(
            f"The folder {folder} is no Megatron checkpoint (no {INDEX}); give a run's checkpoint"
            " folder or one of its iter_* folders."
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
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise LETError(f"The index {path} cannot be read ({first_line(error)}).") from error
    if not isinstance(metadata, Metadata):
        raise LETError(f"The index {path} holds a {type(metadata).__name__}, no index.")
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    return metadata


def _load_data(content: bytes, path: Path) -> Any:
    # Megatron keeps the list of what its checkpoints hold; importing it takes seconds.
    from megatron.core.safe_globals import SAFE_GLOBALS

    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise LETError(
            f"The arguments in {path} cannot be read safely ({first_line(error)})."
        ) from error
