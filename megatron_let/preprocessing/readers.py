"""A reader for datatrove that reports every unusable record instead of dropping it."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import pyarrow
from datatrove.data import Document
from datatrove.pipeline.readers.base import BaseDiskReader
from fsspec.compression import register_compression
from pyarrow import parquet

from megatron_let.errors import first_line

if sys.version_info >= (3, 14):
    from compression import zstd as zstd
else:
    from backports import zstd as zstd

_COMPRESSED = r"(\.(gz|bz2|xz|zst|zstd))?$"
_KINDS = {
    "lines": re.compile(r".\.(jsonl|ndjson|json)" + _COMPRESSED, re.IGNORECASE),
    "rows": re.compile(r".\.parquet$", re.IGNORECASE),
    "text": re.compile(r".\.txt" + _COMPRESSED, re.IGNORECASE),
}
SUFFIXES = ".jsonl, .ndjson, .json, .txt (also with .gz, .bz2, .xz, .zst, .zstd) or .parquet"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ROWS_PER_BATCH = 256
_DAMAGE = (
    EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstd.ZstdError, pyarrow.ArrowException
)  # fmt: skip


def kind_of(name: str) -> str | None:
    """Return how a file is read, by its name; None for an unknown suffix."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), None)


class Rejection(NamedTuple):
    """Why a document is unusable.

    Attributes:
        reason: one of blank_line, malformed, missing_key, not_text, invalid_utf8, too_long,
            empty, unreadable.
        detail: one clause for the report.
    """

    reason: str
    detail: str


Record = dict[str, Any] | Rejection


def _open_zstd(file: Any, **_: str) -> zstd.ZstdFile:
    # The largest window of the format; the default refuses files of `zstd --long`.
    return zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: 31})


# fsspec chooses a codec by the suffix; it has those of .gz, .bz2 and .xz.
register_compression("zstd", _open_zstd, ["zst", "zstd"], force=True)


class RecordReader(BaseDiskReader):
    """Yields one document per record and key, in file order, also if it is unusable.

    A document's metadata has `line` (line or row, from 1), `key`, `subset` (str or None),
    `num_bytes` (UTF-8), and `rejection` if it is unusable.

    Args:
        folder: folder of the files, as a path or a URL of fsspec.
        keys: fields with text, dotted if nested; a text file has one, under the first key.
        max_bytes: a longer document is rejected.

    Attributes:
        damage: why the last file ended early, or None.
    """

    def __init__(self, folder: str, keys: tuple[str, ...], subset_key: str, max_bytes: int) -> None:
        super().__init__(folder)
        self.damage: str | None = None
        self._keys, self._subset_key, self._max_bytes = keys, subset_key, max_bytes
        self._too_long = Rejection("too_long", f"longer than {max_bytes} bytes; split it")

    def read_file(self, filepath: str) -> Iterator[Document]:
        """Yield the documents of a file; what precedes damage is kept."""
        self.damage = None
        read = {"lines": self._lines, "rows": self._rows, "text": self._text}
        with self.data_folder.open(filepath, "rb", compression="infer") as file:
            try:
                for line, record in enumerate(read[kind_of(filepath) or "text"](file), 1):
                    for key in self._keys:
                        yield self._document(f"{filepath}/{line}", line, key, record)
            except (*_DAMAGE, OSError) as error:
                self.damage = _damage(error)

    def _document(self, name: str, line: int, key: str, record: Record) -> Document:
        values: dict[str, Any] = {"line": line, "key": key, "subset": None, "num_bytes": 0}
        text: str | Rejection
        if isinstance(record, Rejection):
            text = record
        else:
            subset = lookup(record, self._subset_key)
            if isinstance(subset, str) and subset:
                # A lone surrogate cannot be encoded in a report.
                values["subset"] = subset.encode(errors="replace").decode()
            text, values["num_bytes"] = _text_of(key, lookup(record, key))
            if values["num_bytes"] > self._max_bytes:
                text = self._too_long
        if isinstance(text, Rejection):
            return Document("", name, metadata={**values, "rejection": text})
        return Document(text, name, metadata=values)

    def _lines(self, file: IO[bytes]) -> Iterator[Record]:
        while line := file.readline(self._max_bytes + 1):
            if len(line) > self._max_bytes and not line.endswith(b"\n"):
                while (rest := file.readline(self._max_bytes)) and not rest.endswith(b"\n"):
                    pass
                yield self._too_long
            else:
                yield _parse(line.removeprefix(_BYTE_ORDER_MARK))

    def _text(self, file: IO[bytes]) -> Iterator[Record]:
        content = file.read(self._max_bytes + 1)
        if len(content) > self._max_bytes:
            yield self._too_long
        else:
            yield {self._keys[0]: content.removeprefix(_BYTE_ORDER_MARK)}

    def _rows(self, file: IO[bytes]) -> Iterator[Record]:
        reader = parquet.ParquetFile(file)
        keys = (*self._keys, self._subset_key)
        wanted = {*keys, *(key.split(".")[0] for key in keys)}
        columns = [name for name in reader.schema_arrow.names if name in wanted]
        for group in range(reader.num_row_groups):
            left = reader.metadata.row_group(group).num_rows
            try:
                for batch in reader.iter_batches(
                    _ROWS_PER_BATCH, row_groups=[group], columns=columns, use_threads=False
                ):
                    yield from _decoded(batch)
                    left -= len(batch)
            except (pyarrow.ArrowException, OSError) as error:
                yield from itertools.repeat(Rejection("unreadable", _damage(error)), left)


def _damage(error: Exception) -> str:
    """Return what is wrong with a file's contents; raise an error that says nothing about them."""
    # bz2 and Parquet raise a plain OSError for damage; others are failures to read.
    if not isinstance(error, _DAMAGE) and (type(error) is not OSError or error.errno):
        raise error
    if isinstance(error, EOFError):
        return "the compressed file is cut short"
    return f"the file is damaged ({first_line(error)})"


def lookup(fields: Any, path: str) -> Any:
    """Return the value at a dotted path, or None."""
    if isinstance(fields, dict) and path in fields:
        return fields[path]
    for name in path.split("."):
        if not isinstance(fields, dict):
            return None
        fields = fields.get(name)
    return fields


def _text_of(key: str, value: Any) -> tuple[str | Rejection, int]:
    """Return a field as text, or why it is unusable; and its size in UTF-8 bytes."""
    if value is None:
        return Rejection("missing_key", f"no value at {key}"), 0
    try:
        text = value.decode() if isinstance(value, bytes) else value
        if not isinstance(text, str):
            return Rejection("not_text", f"the value is a {type(value).__name__}"), 0
        size = len(text.encode())
    except UnicodeError as error:  # also half of a surrogate pair
        return Rejection("invalid_utf8", first_line(error)), 0
    return text or Rejection("empty", "the text is empty"), size


def _parse(line: bytes) -> Record:
    if line.isspace():
        return Rejection("blank_line", "the line is blank")
    try:
        fields = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        reason = "invalid_utf8" if isinstance(error, UnicodeError) else "malformed"
        return Rejection(reason, first_line(error))
    if not isinstance(fields, dict):
        return Rejection("malformed", f"a {type(fields).__name__}, not an object")
    return fields


def _decoded(batch: pyarrow.RecordBatch) -> list[Record]:
    """Return the rows of a batch; reject those with a string that is not UTF-8."""
    if not batch.num_columns:
        return [{} for _ in range(len(batch))]
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [Rejection("invalid_utf8", first_line(error))]
        half = len(batch) // 2
        return _decoded(batch[:half]) + _decoded(batch[half:])
