"""Read plain and compressed files in blocks of whole lines with stable boundaries."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Small, because one piece can decompress to a thousand times its size.
_PIECE_BYTES = 16 * 1024
_BUFFER_BYTES = 1024 * 1024


@dataclass(frozen=True)
class LineBlock:
    """Whole lines of one file.

    Attributes:
        first_line: number of the first line, from 1.
        data: the lines; the last one has no newline if the file ends so, or if it was cut because
            it is longer than a document may be.
    """

    first_line: int
    data: bytes


class InputStream:
    """One input file, decompressed while it is read.

    Attributes:
        damage: why the file ended early, or None; known after the last block.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        decoder = {".zst": _zstandard_decoder, ".gz": _gzip_decoder}.get(path.suffix)
        raw = self._file if decoder is None else _Inflated(self._file, decoder)
        self._raw: io.RawIOBase = raw
        self._lines = io.BufferedReader(raw, _BUFFER_BYTES)

    @property
    def damage(self) -> str | None:
        return self._raw.damage if isinstance(self._raw, _Inflated) else None

    def position(self) -> int:
        """Return the number of bytes on disk read so far."""
        return self._file.tell()

    def blocks(self, block_bytes: int, max_line_bytes: int) -> Iterator[LineBlock]:
        """Yield the lines in blocks that depend only on the content and the two sizes.

        Args:
            block_bytes: a block ends with the line in which it reaches this size.
            max_line_bytes: a longer line at the end of a block is cut one byte beyond this.
        """
        first_line = 1
        while data := self._lines.read(block_bytes):
            data += self._finish_line(data, max_line_bytes)
            yield LineBlock(first_line, data)
            first_line += data.count(b"\n") + (not data.endswith(b"\n"))

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
        self._file.close()

    def _finish_line(self, data: bytes, max_line_bytes: int) -> bytes:
        if data.endswith(b"\n"):
            return b""
        begun = len(data) - data.rfind(b"\n") - 1
        rest = self._lines.readline(max(1, max_line_bytes + 1 - begun))
        if rest and not rest.endswith(b"\n"):
            self._skip_line()
        return rest

    def _skip_line(self) -> None:
        while piece := self._lines.readline(_BUFFER_BYTES):
            if piece.endswith(b"\n"):
                return


class _Inflated(io.RawIOBase):
    """Decompressed bytes; a damaged file yields its readable part, then the stream ends."""

    def __init__(self, file: io.RawIOBase, new_decoder: Callable[[], Any]) -> None:
        self.damage: str | None = None
        self._file = file
        self._new_decoder = new_decoder
        self._decoder = new_decoder()
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            piece = self._next_piece()
            if not piece:
                return 0
            self._pending = memoryview(self._decode(piece))
            if self.damage:
                return 0
        length = min(len(buffer), len(self._pending))
        buffer[:length] = self._pending[:length]
        self._pending = self._pending[length:]
        return length

    def _next_piece(self) -> bytes:
        """Return compressed bytes; start a new decoder after the end of a frame or member."""
        if self.damage:
            return b""
        if not self._decoder.eof:
            piece = self._file.read(_PIECE_BYTES) or b""
            if not piece:
                self.damage = "the compressed file is cut short"
            return piece
        piece = self._decoder.unused_data or self._file.read(_PIECE_BYTES) or b""
        if piece:
            self._decoder = self._new_decoder()
        return piece

    def _decode(self, piece: bytes) -> bytes:
        import zstandard

        try:
            return self._decoder.decompress(piece)
        except (zlib.error, zstandard.ZstdError) as error:
            self.damage = f"the compressed file is damaged ({error})"
            return b""


def _gzip_decoder() -> Any:
    return zlib.decompressobj(wbits=31)


def _zstandard_decoder() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()
