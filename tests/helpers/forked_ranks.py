"""Ranks as forks of one process that has imported everything: most of a tiny run is its imports."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# How long the other ranks may run after one has failed: before SIGTERM, and after it.
_NOTICE_SECONDS, _GRACE_SECONDS = 0.5, 30


def run_ranks(
    module: str,
    argv: list[str],
    ranks: int,
    folder: Path,
    environment: Mapping[str, str],
    log: Path,
    seconds: float,
) -> int:
    """Run `-m module argv` on these ranks in `folder`, and return torchrun's exit code.

    It is 1 as soon as one rank fails; the others are ended then. All ranks print to `log`.

    Raises:
        TimeoutError: the ranks still ran after `seconds`.
    """
    server = _server(environment)
    processes = [
        server.Process(
            target=_rank,
            args=(module, argv, folder, {**environment, **_rank_variables(rank, ranks)}, log),
        )
        for rank in range(ranks)
    ]
    return _run(processes, log, seconds)


def call_ranks(
    function: Callable[..., None],
    args: tuple[Any, ...],
    ranks: int,
    environment: Mapping[str, str],
    log: Path,
    seconds: float,
) -> int:
    """Call a function of a module on these ranks; see `run_ranks`."""
    server = _server(environment)
    processes = [
        server.Process(
            target=_call,
            args=(function, args, {**environment, **_rank_variables(rank, ranks)}, log),
        )
        for rank in range(ranks)
    ]
    return _run(processes, log, seconds)


def _server(environment: Mapping[str, str]) -> ForkServerContext:
    """Return the server that has imported everything; start it if it does not run."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.helpers.preload"])
    # It imports from its working directory, and some libraries read the environment then.
    with contextlib.chdir(ROOT), _variables(environment):
        multiprocessing.forkserver.ensure_running()
    return server


def _run(processes: list[ForkServerProcess], log: Path, seconds: float) -> int:
    """Start these ranks and wait for them."""
    for process in processes:
        process.start()
    try:
        return _wait(processes, log, time.monotonic() + seconds)
    finally:
        for process in processes:
            _signal(process, signal.SIGKILL)
            # In case it has no session of its own yet.
            process.kill()
            process.join()


def _wait(processes: list[ForkServerProcess], log: Path, deadline: float) -> int:
    """Wait for all ranks; after a failure end the others."""
    running = dict(enumerate(processes))
    if _until_one_fails(running, log, deadline):
        # As torchrun, which looks at its ranks ten times a second: another may have a word to say.
        _until_all_end(running, _NOTICE_SECONDS)
        for process in running.values():
            _signal(process, signal.SIGTERM)
        _until_all_end(running, _GRACE_SECONDS)
        return 1
    if running:
        raise TimeoutError(f"ranks {list(running)} still run: {log.read_text()[-3000:]}")
    return 0


def _until_one_fails(running: dict[int, ForkServerProcess], log: Path, deadline: float) -> bool:
    """Remove each rank that ends, until one fails, which is noted, or the time is over."""
    while running and (seconds := deadline - time.monotonic()) > 0:
        multiprocessing.connection.wait([p.sentinel for p in running.values()], seconds)
        for rank, process in list(running.items()):
            if process.exitcode is not None:
                del running[rank]
            if process.exitcode:
                with log.open("a") as file:
                    print(f"\nRoot Cause: rank : {rank}, code {process.exitcode}", file=file)
                return True
    return False


def _until_all_end(running: dict[int, ForkServerProcess], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in running.values():
        process.join(max(0, deadline - time.monotonic()))


def _rank_variables(rank: int, ranks: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
    }  # fmt: skip


def _rank(
    module: str, argv: list[str], folder: Path, environment: dict[str, str], log: Path
) -> None:
    """Become the rank in `folder`, and run the module."""
    _become(environment, log)
    os.chdir(folder)
    sys.argv = [module, *argv]
    _end(functools.partial(runpy.run_module, module, run_name="__main__", alter_sys=True))


def _call(
    function: Callable[..., None], args: tuple[Any, ...], environment: dict[str, str], log: Path
) -> None:
    """Become the rank, and call the function."""
    _become(environment, log)
    _end(functools.partial(function, *args))


def _become(environment: dict[str, str], log: Path) -> None:
    """Take the session, environment and output of a rank."""
    os.setsid()
    # A child of this server would start its own processes by the server, and not as a rank does.
    multiprocessing.set_start_method(None, force=True)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    # It has read the environment of the server when it was imported.
    importlib.reload(sys.modules["huggingface_hub.constants"])


def _end(work: Callable[[], object]) -> None:
    """Do the rank's work and exit as a process of its own would."""
    code: int | str | None = 0
    try:
        work()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        # torch names the rank in its own hook.
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    # multiprocessing ends a child without them.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _signal(process: ForkServerProcess, number: int) -> None:
    """Signal a rank and what it has started."""
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)


@contextlib.contextmanager
def _variables(environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
