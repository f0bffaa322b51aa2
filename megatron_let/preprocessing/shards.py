"""Select documents, and tokenize the files of one task into a shard: a step of datatrove."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile

from megatron_let.data.text_tokenizer import TextTokenizer, token_bytes
from megatron_let.errors import LETError
from megatron_let.files.atomic import write_json
from megatron_let.preprocessing.readers import RecordReader, Rejection

# Suffix of the lists of unusable documents.
REJECTED = ".rejected.jsonl"
# Enough text per call to amortise it, little enough that the encodings stay small.
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 512 * 1024, 1000
_MAX_OUTPUTS = 500
SPLITS = ("train", "valid", "test")

# Numbers of documents, tokens and bytes; the last part of a key is the unit or the reason.
Counts = Counter[tuple[str, ...]]


@dataclass(frozen=True)
class Selection:
    """Documents to write, and their data sets.

    Attributes:
        json_keys: fields that hold text; each gets its own data sets.
        subset_key: field that names a document's subset, dotted if nested.
        include_subsets: subsets to write; empty for all.
        exclude_subsets: subsets not to write.
        split: weights of training, validation and test, or None for no split.
        per_subset: write one data set per subset.
        append_eod: end each document with the end-of-document token.
    """

    json_keys: tuple[str, ...] = ("text",)
    subset_key: str = "meta.pile_set_name"
    include_subsets: tuple[str, ...] = ()
    exclude_subsets: tuple[str, ...] = ()
    split: tuple[float, float, float] | None = None
    per_subset: bool = False
    append_eod: bool = True

    def writes(self, subset: str) -> bool:
        """Return whether documents of a subset are written."""
        included = not self.include_subsets or subset in self.include_subsets
        return included and subset not in self.exclude_subsets

    def output(self, key: str, subset: str, text: str) -> str:
        """Return the name of a document's data set: its key, split and subset.

        The split is drawn from a hash of the text, so equal documents share one and the order of
        the input does not matter.
        """
        split = None if self.split is None else draw_split(text, self.split)
        return self.output_name(key, split, subset)

    def output_name(self, key: str, split: str | None, subset: str) -> str:
        """Return the name of the data set of a key, a split and a subset."""
        parts = [key] if split is None else [key, split]
        if self.per_subset:
            parts.append("".join(c if c.isalnum() or c in "-." else "_" for c in subset).strip("_"))
        return "_".join(parts)


def draw_split(text: str, weights: tuple[float, float, float]) -> str:
    """Return the split of a document, drawn from a hash of its text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    place = int.from_bytes(digest) / 2**64 * sum(weights)
    for name, weight in zip(SPLITS, weights, strict=True):
        place -= weight
        if place < 0:
            return name
    return next(n for n, w in zip(reversed(SPLITS), reversed(weights), strict=True) if w > 0)


def record_of(folder: Path, rank: int) -> Path:
    """Return the record of a shard, which is complete once it exists."""
    return folder / f"{rank:05d}.json"


@dataclass
class TokenizeFiles(PipelineStep):
    """Writes the shard of each rank; the same files give the same bytes in any process.

    A shard is one indexed data set per name (`Selection.output`), by datatrove's writer, the list
    of rejected documents, and a record of the counts of each file, which is written last.

    Attributes:
        folder: folder of the shards.
        tasks: input files of each rank, as paths or URLs.
        strict: raise an error at the first unusable document.
        max_bytes: longer documents are rejected.
    """

    folder: Path
    tasks: list[list[str]]
    tokenizer: TextTokenizer
    selection: Selection
    strict: bool
    max_bytes: int

    name = "Megatron shards"
    type = "TOKENIZER"

    def __post_init__(self) -> None:
        super().__init__()

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write the shard of `rank`, if it is not complete.

        Raises:
            LETError: a document is unusable, under `--strict`.
            OSError: the disk is full, or a file cannot be read.
        """
        if not record_of(self.folder, rank).is_file():
            shard = _Shard(self, rank)
            for url in self.tasks[rank]:
                shard.add_file(url)
            shard.close()
        yield from ()


class _Shard:
    def __init__(self, step: TokenizeFiles, rank: int) -> None:
        self._step, self._rank, self._prefix = step, rank, f"{rank:05d}"
        self._rejected = (step.folder / (self._prefix + REJECTED)).open("w")
        self._end = [step.tokenizer.eod] if step.selection.append_eod else []
        self._outputs: dict[str, MegatronTokenizedFile] = {}
        self._counts: dict[str, Counts] = {}
        self._damage: dict[str, str] = {}

    def add_file(self, url: str) -> None:
        """Write the usable documents of a file; count every document once."""
        step, selection = self._step, self._step.selection
        folder, _, name = url.rpartition("/")
        counts = self._counts[url] = Counter()
        reader = RecordReader(
            folder or "/", selection.json_keys, selection.subset_key, step.max_bytes
        )
        for batch in _batches(map(self._select, reader.read_file(name))):
            usable = [doc for doc in batch if not doc.metadata.keys() & {"rejection", "filtered"}]
            encoded = iter(step.tokenizer.encode([document.text for document in usable]))
            for document in batch:
                values = document.metadata
                counts["documents_in",] += 1
                if "filtered" in values:
                    counts["filtered", values["subset"]] += 1
                elif "rejection" in values:
                    self._reject(url, values["line"], values["rejection"])
                elif ids := next(encoded):
                    self._write(counts, document, ids + self._end)
                else:
                    self._reject(url, values["line"], Rejection("empty", "it has no tokens"))
        if reader.damage:
            if step.strict:
                raise LETError(f"{url}: {reader.damage}; copy the file again.")
            self._damage[url] = reader.damage

    def _select(self, document: Document) -> Document:
        """Mark a document that is not written because of its subset."""
        selection, values = self._step.selection, document.metadata
        if values["subset"] is None:
            values["subset"] = "(none)"
            if selection.include_subsets or selection.exclude_subsets or selection.per_subset:
                missing = Rejection("missing_key", f"no string at {selection.subset_key}")
                values.setdefault("rejection", missing)
        elif not selection.writes(values["subset"]):
            values["filtered"] = True
        return document

    def _write(self, counts: Counts, document: Document, ids: list[int]) -> None:
        values = document.metadata
        output = self._step.selection.output(values["key"], values["subset"], document.text)
        self._file(output).write(ids)
        for group in (("outputs", output), ("subsets", values["subset"])):
            counts[*group, "documents"] += 1
            counts[*group, "tokens"] += len(ids)
            counts[*group, "text_bytes"] += values["num_bytes"]

    def _file(self, output: str) -> MegatronTokenizedFile:
        if output not in self._outputs:
            if len(self._outputs) == _MAX_OUTPUTS:
                raise LETError(
                    f"{self._step.selection.subset_key} has more than {_MAX_OUTPUTS} values, each"
                    " of which would be a data set; omit --per-subset, or give another"
                    " --subset-key."
                )
            self._outputs[output] = MegatronTokenizedFile(
                str(self._step.folder),
                f"{self._prefix}_{output}",
                token_size=token_bytes(self._step.tokenizer),
            )
        return self._outputs[output]

    def _reject(self, url: str, line: int, rejection: Rejection) -> None:
        if self._step.strict:
            raise LETError(
                f"{url}, line {line}: {rejection.detail} ({rejection.reason}); correct it, or omit"
                " --strict to report such documents and continue."
            )
        self._counts[url]["rejected", rejection.reason] += 1
        print(json.dumps({"file": url, "line": line, **rejection._asdict()}), file=self._rejected)

    def close(self) -> None:
        """Write the indices, and the record last."""
        for file in self._outputs.values():
            file.close()
        self._rejected.close()
        counts = {url: [[*key, n] for key, n in c.items()] for url, c in self._counts.items()}
        record = {"files": counts, "damage": self._damage}
        write_json(record_of(self._step.folder, self._rank), record)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    yield batch
