"""Writing a torch_dist checkpoint one tensor at a time, in one process."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_let.checkpoint.torch_dist import FORMAT


@dataclass(frozen=True)
class Shard:
    """A part of a tensor that is to be written: one layer of a stack, or all of it.

    Attributes:
        size: of the whole tensor, with the axis of layers.
        layer: None where there is no such axis.
        read: gives the part, without the axis of layers.
    """

    name: str
    size: tuple[int, ...]
    layer: int | None
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def _chunk(self) -> ChunkStorageMetadata:
        size, zeros = self.size, [0] * (len(self.size) - 1)
        part = size if self.layer is None else (1, *size[1:])
        start = [self.layer or 0, *zeros]
        return ChunkStorageMetadata(offsets=torch.Size(start), sizes=torch.Size(part))

    def write_item(self) -> WriteItem:
        """What torch's writer is told of it."""
        chunk = self._chunk
        return WriteItem(
            index=MetadataIndex(self.name, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=chunk,
                properties=TensorProperties(dtype=self.dtype),
                size=torch.Size(self.size),
            ),
        )


class _Planner(DefaultSavePlanner):
    """Reads each part when torch's writer asks for it, and holds none."""

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
        whole = tensor if shard.layer is None else tensor[None]
        assert write_item.tensor_data is not None
        if whole.shape != write_item.tensor_data.chunk.sizes:
            raise ValueError(f"{shard.name} is {whole.shape}, not {shard.size}")
        return whole.contiguous()


def write_torch_dist(folder: Path, shards: Sequence[Shard], objects: Mapping[str, Any]) -> Metadata:
    """Write a checkpoint as Megatron's `torch_dist` format lays it out.

    Args:
        folder: empty or not there yet.
        objects: what is not a tensor, by its name in the index.
    """
    metadata = save(
        {},
        storage_writer=FileSystemWriter(folder),
        planner=_Planner(shards, objects),
        no_dist=True,
    )
    content = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / FORMAT).write_text(json.dumps(content))
    return metadata
