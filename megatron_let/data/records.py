"""Read the records of a unit, or why a line has none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from megatron_let.data.inputs import Source, Unit

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ROWS_PER_BATCH = 256


@dataclass(frozen=True)
class Rejection:
    """A document that cannot be written.

    Attributes:
        line: line or row number, from 1.
        reason: one of blank_line, malformed, missing_key, not_text, invalid_utf8, too_long,
            empty, unreadable.
        detail: one clause for the report.
    """

    file: str
    line: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Record:
    """Fields of one line or row; a text file has one field, under the first key."""

    file: str
    line: int
    fields: dict[str, Any]


def read_records(
    source: Source, unit: Unit, columns: tuple[str, ...], max_document_bytes: int
) -> Iterator[Record | Rejection]:
    """Yield each line, row or file of a unit.

    Args:
        columns: fields to read, dotted if nested.
        max_document_bytes: a longer line or file is rejected without parsing.
    """
    if source.kind == "lines":
        yield from _read_lines(source.paths[0], unit, max_document_bytes)
    elif source.kind == "parquet":
        yield from _read_rows(source.paths[0], unit, columns)
    else:
        for path in source.paths:
            yield _read_text(path, columns[0], max_document_bytes)


def decode_text(value: Any) -> tuple[str, int] | tuple[str, str]:
    """Decode a field.

    Returns:
        (text, size in UTF-8 bytes), or (reason, detail) of a rejection.
    """
    try:
        if isinstance(value, str):
            return value, len(value.encode())
        if isinstance(value, bytes):
            return value.decode(), len(value)
    except UnicodeDecodeError as error:
        return "invalid_utf8", f"byte {error.start} is not UTF-8"
    except UnicodeEncodeError as error:
        return "invalid_utf8", f"character {error.start} is half of a surrogate pair"
    return "not_text", f"the value is a {type(value).__name__}"


def lookup(fields: Any, path: str) -> Any:
    """Return the value at a dotted path, or None."""
    if isinstance(fields, dict) and path in fields:
        return fields[path]
    for name in path.split("."):
        if not isinstance(fields, dict):
            return None
        fields = fields.get(name)
    return fields


def _read_lines(path: Path, unit: Unit, max_bytes: int) -> Iterator[Record | Rejection]:
    file, data = str(path), unit.data
    start, number = 0, unit.first_line
    if number == 1 and data.startswith(_BYTE_ORDER_MARK):
        start = len(_BYTE_ORDER_MARK)
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        yield _parse_line(file, number, data[start:end], max_bytes)
        start, number = end + 1, number + 1


def _parse_line(file: str, number: int, line: bytes, max_bytes: int) -> Record | Rejection:
    if len(line) > max_bytes:
        return _too_long(file, number, max_bytes)
    if not line or line.isspace():
        return Rejection(file, number, "blank_line", "the line is blank")
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Rejection(file, number, "invalid_utf8", f"byte {error.start} is not UTF-8")
    except (ValueError, RecursionError) as error:
        return Rejection(file, number, "malformed", f"not JSON: {error}")
    if not isinstance(fields, dict):
        return Rejection(file, number, "malformed", f"a {type(fields).__name__}, not an object")
    return Record(file, number, fields)


def _read_rows(path: Path, unit: Unit, columns: tuple[str, ...]) -> Iterator[Record | Rejection]:
    number = unit.first_line
    with parquet.ParquetFile(path) as reader:
        names = set(reader.schema_arrow.names)
        roots = dict.fromkeys(c if c in names else c.split(".")[0] for c in columns)
        present = [root for root in roots if root in names]
        for group in unit.row_groups:
            yield from _read_row_group(reader, group, present, str(path), number)
            number += reader.metadata.row_group(group).num_rows


def _read_row_group(
    reader: parquet.ParquetFile, group: int, columns: list[str], file: str, number: int
) -> Iterator[Record | Rejection]:
    """Yield the rows of one group, numbered from `number`; reject those after damage."""
    last = number + reader.metadata.row_group(group).num_rows
    try:
        batches = reader.iter_batches(
            _ROWS_PER_BATCH, row_groups=[group], columns=columns, use_threads=False
        )
        for batch in batches:
            # A batch without columns converts to no rows.
            rows = _rows(_undecoded(batch)) if columns else iter([{}] * batch.num_rows)
            for fields in rows:
                yield Record(file, number, fields)
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        detail = f"the Parquet data is damaged ({str(error).splitlines()[0]})"
        while number < last:
            yield Rejection(file, number, "unreadable", detail)
            number += 1


def _undecoded(batch: pyarrow.RecordBatch) -> pyarrow.Table:
    """Return strings as bytes, so that invalid UTF-8 does not fail its whole batch."""
    table = pyarrow.table(batch)
    for index, field in enumerate(table.schema):
        column = table.column(index)
        if pyarrow.types.is_dictionary(field.type):
            column = column.combine_chunks().dictionary_decode()
        if pyarrow.types.is_string(column.type):
            column = column.cast(pyarrow.binary())
        elif pyarrow.types.is_large_string(column.type):
            column = column.cast(pyarrow.large_binary())
        table = table.set_column(index, field.name, column)
    return table


def _rows(table: pyarrow.Table) -> Iterator[dict[str, Any]]:
    try:
        yield from table.to_pylist()
    except UnicodeDecodeError:
        # An invalid nested string: only its row loses its fields.
        for row in range(len(table)):
            try:
                yield from table.slice(row, 1).to_pylist()
            except UnicodeDecodeError:
                yield {}


def _read_text(path: Path, key: str, max_bytes: int) -> Record | Rejection:
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        return _too_long(str(path), 1, max_bytes)
    return Record(str(path), 1, {key: content.removeprefix(_BYTE_ORDER_MARK)})


def _too_long(file: str, line: int, max_bytes: int) -> Rejection:
    return Rejection(file, line, "too_long", f"longer than {max_bytes} bytes; split it")
