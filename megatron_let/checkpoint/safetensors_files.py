"""Read and write sharded safetensors, one tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open

from megatron_let.errors import LETError
from megatron_let.files.atomic import write_json
from megatron_let.teacher.weight_files import check_weight_files, weight_files

# Safetensors' names of the supported types.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX = "model.safetensors.index.json"


def write_safetensors(
    folder: Path,
    plan: Mapping[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    max_shard_size: str | int,
) -> None:
    """Write a model's files, holding one tensor at a time.

    `safetensors.torch.save_file` needs all tensors of a shard in memory.

    Args:
        plan: name -> a tensor of the shape and type to write; its values are not used.
        max_shard_size: bytes, or text such as `5GB`.
    """
    shards = split_state_dict_into_shards_factory(
        dict(plan),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for filename, names in shards.filename_to_tensors.items():
        _write_file(folder / filename, {name: plan[name] for name in names}, read)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / INDEX, index)


def _write_file(
    path: Path, plan: Mapping[str, torch.Tensor], read: Callable[[str], torch.Tensor]
) -> None:
    header = json.dumps(_header(plan)).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, planned in plan.items():
            tensor = read(name).to(planned.dtype).contiguous()
            if tensor.shape != planned.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(planned.shape)}")
            file.write(memoryview(tensor.flatten().view(torch.uint8).numpy()))


def _header(plan: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = {dtype: name for name, dtype in DTYPES.items()}
    end = 0
    for name, tensor in plan.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype],
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
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name).clone()

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return the shape and safetensors' name of the type, without reading the tensor."""
        with safe_open(self.files[name], framework="pt") as file:
            part = file.get_slice(name)
            return tuple(part.get_shape()), part.get_dtype()


def _files_of_tensors(folder: Path) -> Mapping[str, Path]:
    files = weight_files(folder)
    if not files or files[0].suffix != ".safetensors":
        pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        hint = f", only the pickle {pickles[0].name}, which can run code" if pickles else ""
        raise LETError(
            f"The folder {folder} has no safetensors that transformers loads{hint}; save the model"
            " as safetensors (save_pretrained) and convert that."
        )
    check_weight_files(folder)
    found: dict[str, Path] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found
