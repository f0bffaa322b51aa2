"""Find the input files and cut each into units of work."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow
from pyarrow import parquet

from megatron_let.data.streams import InputStream
from megatron_let.errors import LETError

Kind = Literal["lines", "parquet", "text"]

_KINDS: dict[Kind, re.Pattern[str]] = {
    "lines": re.compile(r".\.jsonl?(\.zst|\.gz)?$"),
    "parquet": re.compile(r".\.parquet$"),
    "text": re.compile(r".\.txt$"),
}
_SAMPLE_BYTES = 64 * 1024
# Suffix of preprocessing's lists of unusable documents.
REJECTED = ".rejected.jsonl"


@dataclass(frozen=True)
class Source:
    """Files that are read in sequence: one file, or several small text files.

    Attributes:
        index: position among the sources, from 0.
        num_bytes: size on disk.
    """

    index: int
    kind: Kind
    paths: tuple[Path, ...]
    num_bytes: int


@dataclass(frozen=True)
class Unit:
    """A part of one source that one worker turns into one shard.

    Attributes:
        block: position in its source, from 0.
        first_line: number of its first line or row, from 1.
        data: the lines, for a source of lines.
        row_groups: row groups, for a Parquet file.
        input_bytes: bytes on disk that it accounts for.
    """

    source: int
    block: int
    first_line: int = 1
    data: bytes = b""
    row_groups: tuple[int, ...] = ()
    input_bytes: int = 0

    @property
    def name(self) -> str:
        return f"{self.source:05d}-{self.block:06d}"


def find_inputs(patterns: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Return the files of `--input` (files, globs, folders) in the order given, each once.

    Returns:
        The input files, and the files of the folders that are ignored because of their names.

    Raises:
        LETError: a pattern matches nothing, or a named file has an unsupported extension.
    """
    found: dict[Path, None] = {}
    ignored: dict[Path, None] = {}
    for pattern in patterns:
        paths = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))] or [Path(pattern)]
        for path in paths:
            if path.is_dir():
                for file in sorted(p for p in path.rglob("*") if p.is_file()):
                    # A .json in a folder is usually metadata; an output in it is not an input.
                    excluded = file.name.endswith((".json", REJECTED))
                    taken = kind_of(file) is not None and not excluded
                    (found if taken else ignored)[file.resolve()] = None
            elif not path.is_file():
                raise LETError(f"--input {pattern} matches no file or folder.")
            elif kind_of(path) is None:
                raise LETError(
                    f"--input {path} has an unsupported extension; name it .jsonl, .jsonl.zst,"
                    " .jsonl.gz, .parquet or .txt."
                )
            else:
                found[path.resolve()] = None
    if not found:
        raise LETError(
            f"--input {' '.join(patterns)} holds no .jsonl, .jsonl.zst, .jsonl.gz, .parquet or"
            " .txt file."
        )
    return list(found), list(ignored)


def kind_of(path: Path) -> Kind | None:
    """Return how a file is read, by its name; None for an unknown name."""
    return next((kind for kind, name in _KINDS.items() if name.search(path.name)), None)


def group_sources(files: Iterable[tuple[Path, int]], block_bytes: int) -> list[Source]:
    """Group files, given with their sizes in bytes, into sources.

    Consecutive text files share a source up to `block_bytes`; any other file is one source.
    """
    sources: list[Source] = []
    for path, size in files:
        kind = kind_of(path)
        assert kind is not None
        last = sources[-1] if sources else None
        if kind == "text" and last and last.kind == "text" and last.num_bytes + size <= block_bytes:
            sources[-1] = replace(last, paths=(*last.paths, path), num_bytes=last.num_bytes + size)
        else:
            sources.append(Source(len(sources), kind, (path,), size))
    return sources


def file_signature(path: Path) -> str:
    """Return name, size and a hash of both ends: detects a replaced file without reading it all."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return f"{path.name} {size} {digest.hexdigest()[:16]}"


class UnitReader:
    """Yields the units of one source, in order.

    Attributes:
        damage: why the source ended early, or None; known after the last unit.
    """

    def __init__(self, source: Source, block_bytes: int, max_document_bytes: int) -> None:
        self.damage: str | None = None
        self._source = source
        self._block_bytes = block_bytes
        self._max_document_bytes = max_document_bytes

    def __iter__(self) -> Iterator[Unit]:
        kinds = {"lines": self._lines, "parquet": self._row_groups, "text": self._texts}
        for block, unit in enumerate(kinds[self._source.kind]()):
            yield replace(unit, block=block)

    def _lines(self) -> Iterator[Unit]:
        stream = InputStream(self._source.paths[0])
        seen = 0
        try:
            for block in stream.blocks(self._block_bytes, self._max_document_bytes):
                read, seen = stream.position() - seen, stream.position()
                yield Unit(self._source.index, 0, block.first_line, block.data, (), read)
            self.damage = stream.damage
        finally:
            stream.close()

    def _row_groups(self) -> Iterator[Unit]:
        try:
            metadata = parquet.read_metadata(self._source.paths[0])
        except (pyarrow.ArrowException, OSError) as error:
            self.damage = f"the Parquet file is damaged ({str(error).splitlines()[0]})"
            return
        group_bytes = [
            metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)
        ]
        first_row = 1
        for groups in gather(group_bytes, self._block_bytes):
            share = sum(group_bytes[g] for g in groups) / max(1, sum(group_bytes))
            size = int(self._source.num_bytes * share)
            yield Unit(self._source.index, 0, first_row, b"", groups, size)
            first_row += sum(metadata.row_group(g).num_rows for g in groups)

    def _texts(self) -> Iterator[Unit]:
        yield Unit(self._source.index, 0, input_bytes=self._source.num_bytes)


def gather(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, ...]]:
    """Yield runs of indices whose sizes add up to at most `limit`, or single ones above it."""
    run: list[int] = []
    total = 0
    for index, size in enumerate(sizes):
        if run and total + size > limit:
            yield tuple(run)
            run, total = [], 0
        run.append(index)
        total += size
    if run:
        yield tuple(run)
