"""Worker processes that take one item at a time, so that memory stays constant."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from megatron_let.errors import LETError

_PR_SET_PDEATHSIG = 1


class WorkerPool[Item, Result]:
    """Forked processes, which share the memory of what was loaded before.

    Args:
        num_workers: number of processes, at least 1.
        work: function that the workers call on each item.
    """

    def __init__(self, num_workers: int, work: Callable[[Item], Result]) -> None:
        context = multiprocessing.get_context("fork")
        self._processes: dict[Connection, multiprocessing.process.BaseProcess] = {}
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    def __enter__(self) -> WorkerPool[Item, Result]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.join()

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yield results as they arrive; the next item is read while all workers are busy.

        Raises:
            LETError: a worker was killed.
            Exception: `work` raised it in a worker.
        """
        idle = list(self._processes)
        for item in items:
            while not idle:
                yield from self._collect(idle)
            self._send(idle.pop(), item)
        while len(idle) < len(self._processes):
            yield from self._collect(idle)

    def _send(self, connection: Connection, item: Item) -> None:
        try:
            connection.send(item)
        except BrokenPipeError:
            self._explain_death(connection)

    def _collect(self, idle: list[Connection]) -> Iterator[Result]:
        for connection in wait([c for c in self._processes if c not in idle]):
            assert isinstance(connection, Connection)
            try:
                result = connection.recv()
            except (EOFError, ConnectionResetError):
                self._explain_death(connection)
            if isinstance(result, Exception):
                raise result
            idle.append(connection)
            yield result

    def _explain_death(self, connection: Connection) -> None:
        process = self._processes[connection]
        process.join()
        raise LETError(
            f"A worker died with exit code {process.exitcode} (-9: often the kernel's out-of-memory"
            " killer); give fewer --workers and run the same command again, which continues where"
            " it stopped."
        )


def _serve(connection: Connection, work: Callable[[Any], Any], parent: int) -> None:
    # A worker must not outlive its parent, because it inherits the parent's lock.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        item = connection.recv()
        try:
            result = work(item)
        except (LETError, OSError) as error:
            result = error
        except Exception:
            result = RuntimeError(traceback.format_exc())
        connection.send(result)
