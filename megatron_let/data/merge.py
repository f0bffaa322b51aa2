"""Merge shards into data sets, in constant memory."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.indexed_dataset import (
    IndexedDataset,
    IndexedDatasetBuilder,
    _IndexWriter,
)

from megatron_let.data.shards import Shards
from megatron_let.files.atomic import partial_path, replace_from_partial

_DOCUMENTS_AT_A_TIME = 1024 * 1024


class StreamedDatasetBuilder(IndexedDatasetBuilder):
    """Megatron's builder, with the document lengths on disk instead of in lists.

    Megatron's lists would take 17 GB for the Pile's 200M documents; the bytes written are the same.

    Args:
        prefix: path of the data set without suffix; its files appear when `finish` is called.
        dtype: type of the token ids.
    """

    def __init__(self, prefix: Path, dtype: type[np.number[Any]]) -> None:
        self._bin, self._idx, lengths = (
            prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx", ".lengths")
        )
        super().__init__(str(partial_path(self._bin)), dtype=dtype)
        self._lengths_path = partial_path(lengths)
        self._lengths = self._lengths_path.open("wb")

    def add_shard(self, prefix: Path, lengths: npt.NDArray[np.int32]) -> None:
        """Add a whole shard, whose documents have these numbers of tokens."""
        with prefix.with_suffix(".bin").open("rb") as shard:
            shutil.copyfileobj(shard, self.data_file)
        self._lengths.write(lengths.tobytes())

    def add_tokens(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> None:
        """Add documents that are concatenated in `tokens`."""
        self.data_file.write(tokens.tobytes())
        self._lengths.write(lengths.tobytes())

    def finish(self) -> None:
        """Write the index and move both files to their names."""
        self._lengths.close()
        self.data_file.close()
        with _IndexWriter(str(partial_path(self._idx)), self.dtype) as writer:
            self._write_index(writer.idx_writer)
        os.unlink(self._lengths_path)
        replace_from_partial(self._bin)
        replace_from_partial(self._idx)

    def _write_index(self, file: Any) -> None:
        """Write in pieces what `_IndexWriter.write` writes for one sequence per document."""
        documents = self._lengths_path.stat().st_size // np.dtype(np.int32).itemsize
        file.write(struct.pack("<QQ", documents, documents + 1))
        for lengths in self._pieces():
            file.write(lengths.tobytes())
        offset = 0
        for lengths in self._pieces():
            ends = offset + np.cumsum(lengths, dtype=np.int64) * np.dtype(self.dtype).itemsize
            file.write(np.concatenate(([offset], ends[:-1])).astype(np.int64).tobytes())
            offset = int(ends[-1])
        for start in range(0, documents + 1, _DOCUMENTS_AT_A_TIME):
            stop = min(start + _DOCUMENTS_AT_A_TIME, documents + 1)
            file.write(np.arange(start, stop, dtype=np.int64).tobytes())

    def _pieces(self) -> Iterator[npt.NDArray[np.int32]]:
        with self._lengths_path.open("rb") as file:
            while True:
                piece = np.fromfile(file, dtype=np.int32, count=_DOCUMENTS_AT_A_TIME)
                if not len(piece):
                    return
                yield piece


def merge_shards(
    shards: Shards, names: Iterable[str], prefixes: dict[str, Path], dtype: type[np.number[Any]]
) -> None:
    """Write the data sets of a run from its shards, in the order of `names`.

    Args:
        names: names of the shards.
        prefixes: path of each data set without suffix, by its name.
        dtype: type of the token ids.
    """
    builders = {name: StreamedDatasetBuilder(prefixes[name], dtype) for name in sorted(prefixes)}
    for name in names:
        outputs = shards.read(name)["outputs"]
        if outputs:
            _add_shard(shards, name, [builders[output] for output in outputs])
    for builder in builders.values():
        builder.finish()


def _add_shard(shards: Shards, name: str, builders: list[StreamedDatasetBuilder]) -> None:
    """Add a shard to its data sets, which are in the order of its record."""
    prefix = shards.prefix(name)
    # Kept, because its lengths are views into a memory map that it closes when collected.
    shard = IndexedDataset(str(prefix))
    lengths = shard.sequence_lengths
    if len(builders) == 1:
        builders[0].add_shard(prefix, lengths)
        return
    owners = np.load(shards.outputs(name))
    tokens = np.fromfile(prefix.with_suffix(".bin"), dtype=builders[0].dtype)
    token_owners = np.repeat(owners, lengths)
    for number, builder in enumerate(builders):
        builder.add_tokens(tokens[token_owners == number], lengths[owners == number])
