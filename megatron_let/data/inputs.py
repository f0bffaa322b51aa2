"""Which input files there are, and how each is cut into units of work."""

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
# Ends the names of our own lists of documents that could not be used.
REJECTED = ".rejected.jsonl"


@dataclass(frozen=True)
class Source:
    """Files that are read one after the other: one file, or small text files together.

    Attributes:
        index: place among the sources, from 0.
        num_bytes: size on disk.
    """

    index: int
    kind: Kind
    paths: tuple[Path, ...]
    num_bytes: int


@dataclass(frozen=True)
class Unit:
    """A piece of one source that one worker turns into one shard.

    Attributes:
        block: place in its source, from 0.
        first_line: number, from 1, of its first line or row.
        data: the lines, for a source of lines.
        row_groups: of the Parquet file.
        input_bytes: what it adds to the bytes read from disk.
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
    """Input files of `--input`: files, globs and folders, in the order given, each once.

    Returns:
        The files, and those of the folders that are left out for their suffix.

    Raises:
        LETError: a pattern matches nothing, or a named file is of no known kind.
    """
    found: dict[Path, None] = {}
    ignored: dict[Path, None] = {}
    for pattern in patterns:
        paths = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))] or [Path(pattern)]
        for path in paths:
            if path.is_dir():
                for file in sorted(p for p in path.rglob("*") if p.is_file()):
                    # In a folder a .json is more often a description than lines, and an output
                    # below it is no input of the next start.
                    aside = file.name.endswith((".json", REJECTED))
                    taken = kind_of(file) is not None and not aside
                    (found if taken else ignored)[file.resolve()] = None
            elif not path.is_file():
                raise LETError(f"--input {pattern} matches no file or folder.")
            elif kind_of(path) is None:
                raise LETError(
                    f"--input {path} is of no known kind; name it .jsonl, .jsonl.zst, .jsonl.gz,"
                    " .parquet or .txt."
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
    """How a file is read, by its name; None if it is not."""
    return next((kind for kind, name in _KINDS.items() if name.search(path.name)), None)


def group_sources(files: Iterable[tuple[Path, int]], block_bytes: int) -> list[Source]:
    """Group files, with their sizes in bytes, into sources.

    Consecutive text files share a source up to `block_bytes`; every other file is its own.
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
    """Name, size and a hash of both ends: tells a replaced file without reading all of it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return f"{path.name} {size} {digest.hexdigest()[:16]}"


class UnitReader:
    """The units of one source, in order.

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
