"""Extract documents from the files of Debian's documentation packages."""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

_ENTRIES_PER_DOCUMENT = 50
# Type numbers of R's serialisation (R Internals, 1.8).
_R_STRING, _R_STRING_VECTOR = 9, 16
_R_VERSION_WITH_ENCODING = 3


def html_text(html: str) -> str:
    """Return the text of an HTML page, one block per line."""
    parser = _TextOfHtml()
    parser.feed(html)
    parser.close()
    lines = (re.sub(r"[^\S\n]+", " ", line).strip() for line in "".join(parser.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class _TextOfHtml(HTMLParser):
    _SILENT = frozenset({"head", "script", "style"})
    _BLOCKS = frozenset(
        {"p", "div", "br", "li", "tr", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "dd"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in self._SILENT
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in self._SILENT and self._silent > 0
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data)


def r_string_vectors(database: bytes) -> Iterator[list[str]]:
    """Yield the character vectors of an R lazy-load database (`.rdb`), in file order.

    Raises:
        ValueError: a record is not a plain character vector.
    """
    while database:
        # A record is four bytes of length and a zlib stream.
        stream = zlib.decompressobj()
        record = stream.decompress(database[4:]) + stream.flush()
        database = stream.unused_data
        yield _r_strings(record)


def _r_strings(record: bytes) -> list[str]:
    """Read "X", three versions, an encoding's name, then a vector: all big-endian (XDR)."""
    form, version = struct.unpack_from(">2si", record)
    offset = 14
    if version >= _R_VERSION_WITH_ENCODING:
        offset += 4 + struct.unpack_from(">i", record, offset)[0]
    flags, count = struct.unpack_from(">ii", record, offset)
    if form != b"X\n" or flags & 0xFF != _R_STRING_VECTOR:
        raise ValueError(f"an R record of type {flags & 0xFF} is not a character vector")
    offset += 8
    strings = []
    for _ in range(count):
        flags, length = struct.unpack_from(">ii", record, offset)
        if flags & 0xFF != _R_STRING:
            raise ValueError(f"an R string of type {flags & 0xFF}")
        offset += 8
        # A length of -1 marks a missing value.
        strings.append(record[offset : offset + max(length, 0)].decode())
        offset += max(length, 0)
    return strings


def _html_pages(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.html")):
        yield html_text(path.read_text(errors="replace"))


def _text_files(suffix: str) -> Callable[[Path], Iterator[str]]:
    def read(folder: Path) -> Iterator[str]:
        for path in sorted(folder.rglob(f"*{suffix}")):
            # Symbolic links may point outside the package.
            if path.is_file():
                opener = gzip.open if suffix.endswith(".gz") else open
                with opener(path, "rt", errors="replace") as file:
                    yield file.read()

    return read


def _dictionary(folder: Path) -> Iterator[str]:
    [path] = folder.rglob("*.dict.dz")
    with gzip.open(path, "rt", errors="replace") as file:
        entries = re.split(r"\n(?=\S)", file.read())
    for start in range(0, len(entries), _ENTRIES_PER_DOCUMENT):
        yield "\n".join(entries[start : start + _ENTRIES_PER_DOCUMENT])


def _novels(folder: Path) -> Iterator[str]:
    """Yield one document per chapter: six whole novels are too few documents to split."""
    [path] = folder.rglob("data/Rdata.rdb")
    for lines in r_string_vectors(path.read_bytes()):
        yield from re.split(r"(?mi)^(?=chapter\b)", "\n".join(lines))


# Package name -> function that yields the documents of the folder it was unpacked into.
PACKAGES: dict[str, Callable[[Path], Iterator[str]]] = {
    "anarchism": _html_pages,
    "dict-gcide": _dictionary,
    "linux-doc-6.12": _text_files(".rst.gz"),
    "perl-doc": _text_files(".pod"),
    "postgresql-doc-15": _html_pages,
    "r-cran-janeaustenr": _novels,
}
