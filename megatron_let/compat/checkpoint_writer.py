"""The asynchronous checkpoint writer outlives a run's signals, and its death ends the run.

Megatron's trainer waits for the writer without a limit, and looks neither at its exit code nor for
a signal meanwhile. A signal to the whole process group, which torchrun and Slurm send, would end
the writer and keep the trainer.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.managers import SyncManager
from types import ModuleType
from typing import Any

import torch

from megatron_let.compat.cpu_shims import cpu_shims
from megatron_let.compat.signals import SIGNALS, outlive_signals
from megatron_let.errors import LETError, print_error

_CALLER = "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller."
_FILES = "megatron.core.dist_checkpointing.strategies.filesystem_async:"


def write_checkpoints(*args: Any, **kwargs: Any) -> None:
    """Run the writer's loop, in a new process in which nothing is patched."""
    outlive_signals()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    if not torch.cuda.is_available():
        for name in ("device_count", "set_device", "synchronize"):
            setattr(torch.cuda, name, cpu_shims()[f"torch.cuda:{name}"](None))
    PersistentAsyncCaller.async_loop(*args, **kwargs)


class ResultsQueue:
    """A queue that holds pickles, so that its process does not import torch to hold results."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, result: Any) -> None:
        self._queue.put(pickle.dumps(result))

    def get_nowait(self) -> Any:
        return pickle.loads(self._queue.get_nowait())


def results_queue(mp_mode: str = "spawn") -> Any:
    """Return the queue of the writer's results, whose process outlives signals too."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
        with _without_main():
            manager.start(outlive_signals)
        filesystem_async._results_queue = ResultsQueue(manager.Queue())
    return filesystem_async._results_queue


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep a new process from importing the training script, and torch with it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def wrap_get_process(original: Callable[..., Any]) -> Any:
    """Wrap the start of the writer: a thread of the trainer watches the process.

    The writer is a child of the trainer (`spawn`). A fork server between them would die of the
    signals, and hide the writer's exit code.
    """

    @functools.wraps(original)
    def get_process(rank: int, mp_mode: str = "spawn", *args: Any, **kwargs: Any) -> Any:
        from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

        known = PersistentAsyncCaller._persistent_process
        # The new process inherits the mask, and cannot ignore signals before it has been loaded.
        # The start of the resource tracker would unblock SIGTERM.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            process = original(rank, "spawn", *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if process is not known:
            _watch(process)
        return process

    return staticmethod(get_process)


def _watch(process: Any) -> None:
    ending = threading.Event()

    def end() -> None:
        ending.set()
        # multiprocessing would send it SIGTERM, and wait.
        process.kill()

    atexit.register(end)
    threading.Thread(target=_end_run_with, args=(process, ending), daemon=True).start()


def _end_run_with(process: Any, ending: threading.Event) -> None:
    """End this process when the writer has died; the main thread may wait for it indefinitely."""
    wait([process.sentinel])
    # None for the moment in which the main thread collects the exit code.
    while (code := process.exitcode) is None:
        time.sleep(0.1)
    if code != 0 and not ending.is_set():
        print_error(
            LETError(
                f"The checkpoint writer of this rank ended with exit code {code}, so the run ends;"
                " the last complete checkpoint is unchanged: look for the reason above and in the"
                " kernel's log (out of memory; on a GPU, PYTORCH_ALLOC_CONF=expandable_segments"
                " needs permissions that it may lack), and start the run again."
            )
        )
        os._exit(1)


def wrappers() -> dict[str, Callable[[Any], Any]]:
    """Return {patch target: function from the original to its replacement}."""
    return {
        # A module-level function, because the writer's process imports it by name.
        _CALLER + "async_loop": lambda original: staticmethod(write_checkpoints),
        _CALLER + "_get_process": wrap_get_process,
        _FILES + "get_write_results_queue": lambda original: results_queue,
    }
