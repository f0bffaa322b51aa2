"""Progress of preprocessing: a bar on a terminal, a line every 30 s in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megatron_let.data.counts import Counts

_SECONDS_BETWEEN_LINES = 30.0


class ProgressBar:
    """Show documents/s, MB/s of text, tokens and time left.

    Args:
        total_bytes: size of the input files on disk.
    """

    def __init__(self, console: Console, total_bytes: int) -> None:
        self._console = console
        self._total_bytes = total_bytes
        self._skipped = self._read = 0
        self._documents = self._tokens = self._text_bytes = 0
        self._start = self._last_line = time.monotonic()
        self._progress = Progress(
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=max(1, total_bytes))

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def skip(self, input_bytes: int) -> None:
        """Count bytes that an earlier run finished."""
        self._skipped += input_bytes
        self._progress.advance(self._task, input_bytes)

    def advance(self, input_bytes: int, counts: Counts) -> None:
        """Count a finished shard."""
        written = counts.written()
        self._read += input_bytes
        self._documents += counts.documents_in
        self._tokens += written.tokens
        self._text_bytes += written.text_bytes
        self._progress.update(self._task, advance=input_bytes, description=self._rates())
        if not self._console.is_terminal:
            self._print_line()

    def _rates(self) -> str:
        seconds = max(1e-3, time.monotonic() - self._start)
        return (
            f"{self._documents / seconds:,.0f} documents/s, "
            f"{self._text_bytes / seconds / 1e6:.1f} MB/s, {self._tokens:,} tokens"
        )

    def _print_line(self) -> None:
        now = time.monotonic()
        if now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        done = (self._skipped + self._read) / max(1, self._total_bytes)
        left = (self._total_bytes - self._skipped - self._read) * (now - self._start)
        minutes = left / max(1, self._read) / 60
        self._console.print(f"{done:.0%}, {self._rates()}, {minutes:.0f} minutes left")
