"""Write one unit of work as one shard: a small indexed data set and a record of its contents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_let.data.counts import NO_SUBSET, Counts, Tally
from megatron_let.data.inputs import REJECTED, Source, Unit
from megatron_let.data.records import Record, Rejection, decode_text, lookup, read_records
from megatron_let.data.selection import Selection
from megatron_let.data.text_tokenizer import TextTokenizer
from megatron_let.errors import LETError
from megatron_let.files.atomic import atomic_file, write_json

# Enough text per call to amortise it, little enough that the encodings stay small.
_BATCH_BYTES = 512 * 1024
_MAX_OUTPUTS = 500


@dataclass(frozen=True)
class Document:
    """A text and the data set it belongs to."""

    origin: Rejection
    output: str
    subset: str
    text: str
    num_bytes: int


@dataclass(frozen=True)
class Shards:
    """The shards of a run, in one folder."""

    folder: Path

    def record(self, name: str) -> Path:
        """Return the path of a shard's record; the shard is complete once it exists."""
        return self.folder / f"{name}.json"

    def prefix(self, name: str) -> Path:
        """Return the path of a shard's `.bin` and `.idx`, without suffix."""
        return self.folder / name

    def outputs(self, name: str) -> Path:
        """Return the path of the index of each document's data set among the record's names."""
        return self.folder / f"{name}.outputs.npy"

    def rejections(self, name: str) -> Path:
        """Return the path of the rejected documents, as JSON lines."""
        return self.folder / (name + REJECTED)

    def read(self, name: str) -> dict[str, Any]:
        """Read a shard's record."""
        return json.loads(self.record(name).read_text())


@dataclass(frozen=True)
class ShardWriter:
    """Turns units into shards; the same unit gives the same bytes in any process.

    Attributes:
        max_document_bytes: longer documents are rejected.
        strict: raise an error at the first unusable document.
    """

    shards: Shards
    sources: list[Source]
    tokenizer: TextTokenizer
    selection: Selection
    max_document_bytes: int
    strict: bool

    @property
    def dtype(self) -> type[np.number[Any]]:
        """Return the type of the token ids."""
        return DType.optimal_dtype(self.tokenizer.vocab_size)

    def __call__(self, unit: Unit) -> tuple[Unit, Counts]:
        """Write the shard of a unit; return the unit without its lines, and its counts.

        Raises:
            LETError: a document is unusable, under `--strict`.
            OSError: the disk is full.
        """
        prefix = self.shards.prefix(unit.name)
        with (
            atomic_file(self.shards.rejections(unit.name)) as rejected_partial,
            atomic_file(prefix.with_suffix(".idx")) as idx_partial,
            atomic_file(prefix.with_suffix(".bin")) as bin_partial,
        ):
            builder = IndexedDatasetBuilder(str(bin_partial), dtype=self.dtype)
            counts, outputs, rejected = self._write_documents(unit, builder)
            builder.finalize(str(idx_partial))
            names = list(dict.fromkeys(outputs))
            if len(names) > 1:
                self._write_outputs(unit, names, outputs)
            rejected_partial.write_text("".join(json.dumps(asdict(r)) + "\n" for r in rejected))
        counts.check()
        # The record comes last: it marks the shard as complete.
        write_json(self.shards.record(unit.name), {"outputs": names, "counts": counts.to_json()})
        return Unit(unit.source, unit.block, input_bytes=unit.input_bytes), counts

    def _write_documents(
        self, unit: Unit, builder: IndexedDatasetBuilder
    ) -> tuple[Counts, list[str], list[Rejection]]:
        counts, outputs, rejected = Counts(), [], []
        for item in self._encoded(self._batches(unit, counts)):
            if isinstance(item, Rejection):
                if self.strict:
                    raise LETError(
                        f"{item.file}, line {item.line}: {item.detail} ({item.reason}); correct"
                        " it, or omit --strict to report such documents and continue."
                    )
                rejected.append(item)
                counts.rejected[item.reason] += 1
                continue
            document, ids = item
            builder.add_document(torch.from_numpy(ids), [len(ids)])
            outputs.append(document.output)
            counts.add_document(
                document.output, document.subset, Tally(1, len(ids), document.num_bytes)
            )
        return counts, outputs, rejected

    def _encoded(
        self, batches: Iterator[list[Document | Rejection]]
    ) -> Iterator[tuple[Document, np.ndarray[Any, Any]] | Rejection]:
        end = [self.tokenizer.eod] if self.selection.append_eod else []
        dtype = self.dtype
        for batch in batches:
            texts = [item.text for item in batch if isinstance(item, Document)]
            encoded = iter(self.tokenizer.encode(texts))
            for item in batch:
                if isinstance(item, Rejection):
                    yield item
                    continue
                ids = next(encoded)
                if len(ids):
                    yield item, np.append(ids, end).astype(dtype)
                else:
                    origin = item.origin
                    yield Rejection(origin.file, origin.line, "empty", "the text has no tokens")

    def _batches(self, unit: Unit, counts: Counts) -> Iterator[list[Document | Rejection]]:
        batch: list[Document | Rejection] = []
        size = 0
        for item in self._documents(unit, counts):
            num_bytes = item.num_bytes if isinstance(item, Document) else 0
            if batch and size + num_bytes > _BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(item)
            size += num_bytes
        yield batch

    def _documents(self, unit: Unit, counts: Counts) -> Iterator[Document | Rejection]:
        """Yield the documents of a unit; filtered ones are only counted."""
        selection, source = self.selection, self.sources[unit.source]
        columns = (*selection.json_keys, selection.subset_key)
        for record in read_records(source, unit, columns, self.max_document_bytes):
            for key in selection.json_keys:
                counts.documents_in += 1
                if isinstance(record, Rejection):
                    yield record
                    continue
                item = self._document(record, key)
                if isinstance(item, str):
                    counts.filtered[item] += 1
                else:
                    yield item

    def _document(self, record: Record, key: str) -> Document | Rejection | str:
        """Return a document, its rejection, or the subset for which it is filtered."""
        selection = self.selection
        subset = _subset(record, selection.subset_key)
        if subset is None:
            if selection.filters or selection.per_subset:
                return _reject(record, "missing_key", f"no string at {selection.subset_key}")
            subset = NO_SUBSET
        if not selection.writes(subset):
            return subset
        value = lookup(record.fields, key)
        if value is None:
            return _reject(record, "missing_key", f"no value at {key}")
        text, size = decode_text(value)
        if isinstance(size, str):
            return _reject(record, text, size)
        if size > self.max_document_bytes:
            limit = self.max_document_bytes
            return _reject(record, "too_long", f"longer than {limit} bytes; split it")
        if not text:
            return _reject(record, "empty", "the text is empty")
        output = selection.output(key, subset, text)
        origin = Rejection(record.file, record.line, "", "")
        return Document(origin, output, subset, text, size)

    def _write_outputs(self, unit: Unit, names: list[str], outputs: list[str]) -> None:
        if len(names) > _MAX_OUTPUTS:
            raise LETError(
                f"{self.selection.subset_key} has more than {_MAX_OUTPUTS} values, each of which"
                " would be a data set; omit --per-subset, or give another --subset-key."
            )
        numbers = {name: number for number, name in enumerate(names)}
        path = self.shards.outputs(unit.name)
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.save(file, np.array([numbers[name] for name in outputs], dtype=np.uint16))


def _subset(record: Record, key: str) -> str | None:
    value = lookup(record.fields, key)
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if not isinstance(value, str) or not value:
        return None
    # A lone surrogate cannot be encoded in a report.
    return value.encode(errors="replace").decode()


def _reject(record: Record, reason: str, detail: str) -> Rejection:
    return Rejection(record.file, record.line, reason, detail)
