"""Read and write sharded safetensors, one tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from megatron_let.errors import LETError, first_line
from megatron_let.files.atomic import write_json

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorPlan:
    """Name, shape and type of a tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    folder: Path,
    plan: Sequence[TensorPlan],
    read: Callable[[str], torch.Tensor],
    max_shard_size: str | int,
) -> None:
    """Write a model's files, holding one tensor at a time.

    `safetensors.torch.save_file` needs all tensors of a shard in memory.

    Args:
        read: returns a tensor by its name.
        max_shard_size: bytes, or text such as `5GB`.
    """
    shards = split_state_dict_into_shards_factory(
        {tensor.name: tensor for tensor in plan},
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    planned = {tensor.name: tensor for tensor in plan}
    for filename, names in shards.filename_to_tensors.items():
        _write_file(folder / filename, [planned[name] for name in names], read)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / INDEX, index)


def _write_file(
    path: Path, plan: Sequence[TensorPlan], read: Callable[[str], torch.Tensor]
) -> None:
    header = json.dumps(_header(plan)).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for planned in plan:
            tensor = read(planned.name).to(planned.dtype).contiguous()
            if tuple(tensor.shape) != planned.shape:
                raise ValueError(f"{planned.name} is {tuple(tensor.shape)}, not {planned.shape}")
            file.write(memoryview(tensor.flatten().view(torch.uint8).numpy()))


def _header(plan: Sequence[TensorPlan]) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in plan:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    return header


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, read one at a time.

    Raises:
        LETError: no safetensors, a missing shard, or a truncated file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files_of_tensors(folder)

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self.files)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            LETError: the folder has no such tensor.
        """
        if name not in self.files:
            raise LETError(f"The folder {self.folder} has no tensor {name}; copy it again.")
        # Reopened for each tensor, so that the pages read so far do not stay in memory.
        with _opened(self.files[name]) as file:
            return file.get_tensor(name).clone()

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return the shape and safetensors' name of the type, without reading the tensor."""
        with _opened(self.files[name]) as file:
            part = file.get_slice(name)
            return tuple(part.get_shape()), part.get_dtype()


def _files_of_tensors(folder: Path) -> Mapping[str, Path]:
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise LETError(f"{folder / INDEX} is damaged ({first_line(error)}).") from error
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / SINGLE] if (folder / SINGLE).is_file() else []
    if not files:
        pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        hint = f", only the pickle {pickles[0].name}, which can run code" if pickles else ""
        raise LETError(
            f"The folder {folder} has no safetensors{hint}; save the model as safetensors"
            " (save_pretrained) and convert that."
        )
    found: dict[str, Path] = {}
    for path in files:
        if not path.is_file():
            raise LETError(f"The shard {path} is missing; copy the folder again.")
        with _opened(path) as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise LETError(
            f"The file {path} is cut short or damaged at {path.stat().st_size} bytes"
            f" ({first_line(error)}); copy it again."
        ) from error
