"""Tokenize the files of one task into a shard: a step of datatrove."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile

from megatron_let.data.text_tokenizer import token_bytes
from megatron_let.errors import LETError
from megatron_let.files.atomic import write_json
from megatron_let.preprocessing.job import REJECTED, Job
from megatron_let.preprocessing.readers import RecordReader, Rejection

# Enough text per call to amortise it, little enough that the encodings stay small.
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 512 * 1024, 1000
_MAX_OUTPUTS = 500

# Numbers of documents, tokens and bytes; the last part of a key is the unit or the reason.
Counts = Counter[tuple[str, ...]]


class TokenizeFiles(PipelineStep):
    """Writes the shard of each rank; the same files give the same bytes in any process.

    A shard is one indexed data set per name (`Selection.output`), by datatrove's writer, the list
    of rejected documents, and a record of the counts of each file, which is written last.
    """

    name = "Megatron shards"
    type = "TOKENIZER"

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write the shard of `rank`, if it is not complete.

        An error is also noted in a file for the command, which runs in another process.

        Raises:
            LETError: a document is unusable, under `--strict`.
            OSError: the disk is full, or a file cannot be read.
        """
        try:
            if not self._job.record(rank).is_file():
                shard = _Shard(self._job, rank)
                for url in self._job.tasks[rank]:
                    shard.add_file(url)
                shard.close()
        except (LETError, OSError) as error:
            message = self._job.explain(error) if isinstance(error, OSError) else error
            with contextlib.suppress(OSError):
                self._job.failure.write_text(str(message))
            raise
        yield from ()


class _Shard:
    def __init__(self, job: Job, rank: int) -> None:
        self._job, self._rank, self._prefix = job, rank, f"{rank:05d}"
        self._options, self._selection = job.options, job.options.selection
        self._rejected = (job.work / (self._prefix + REJECTED)).open("w")
        self._end = [job.tokenizer.eod] if self._selection.append_eod else []
        self._outputs: dict[str, MegatronTokenizedFile] = {}
        self._counts: dict[str, Counts] = {}
        self._damage: dict[str, str] = {}

    def add_file(self, url: str) -> None:
        """Write the usable documents of a file; count every document once."""
        selection = self._selection
        folder, _, name = url.rpartition("/")
        counts = self._counts[url] = Counter()
        reader = RecordReader(
            folder or "/",
            selection.json_keys,
            selection.subset_key,
            self._options.max_document_bytes,
        )
        for batch in _batches(map(self._select, reader.read_file(name))):
            usable = [doc for doc in batch if not doc.metadata.keys() & {"rejection", "filtered"}]
            encoded = iter(self._job.tokenizer.encode([document.text for document in usable]))
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
            if self._options.strict:
                raise LETError(f"{url}: {reader.damage}; copy the file again.")
            self._damage[url] = reader.damage

    def _select(self, document: Document) -> Document:
        """Mark a document that is not written because of its subset."""
        selection, values = self._selection, document.metadata
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
        output = self._selection.output(values["key"], values["subset"], document.text)
        self._file(output).write(ids)
        for group in (("outputs", output), ("subsets", values["subset"])):
            counts[*group, "documents"] += 1
            counts[*group, "tokens"] += len(ids)
            counts[*group, "text_bytes"] += values["num_bytes"]

    def _file(self, output: str) -> MegatronTokenizedFile:
        if output not in self._outputs:
            if len(self._outputs) == _MAX_OUTPUTS:
                raise LETError(
                    f"{self._selection.subset_key} has more than {_MAX_OUTPUTS} values, each"
                    " of which would be a data set; omit --per-subset, or give another"
                    " --subset-key."
                )
            self._outputs[output] = MegatronTokenizedFile(
                str(self._job.work),
                f"{self._prefix}_{output}",
                token_size=token_bytes(self._job.tokenizer),
            )
        return self._outputs[output]

    def _reject(self, url: str, line: int, rejection: Rejection) -> None:
        if self._options.strict:
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
        write_json(self._job.record(self._rank), record)


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
