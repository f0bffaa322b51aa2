"""Call functions in forks of this process, which has imported everything already."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable


def exit_codes_in_forks(*functions: Callable[[], int]) -> list[int]:
    """Return what each function returned in a fork, all at a time.

    The code is 1 for an exception and -N for signal N.
    """
    children = [_fork(function) for function in functions]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    for child in children:
        # A checkpoint writer outlives a process that ends by _exit.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(status) for status in statuses]


def _fork(function: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        os.setsid()
        code = 1
        try:
            code = function()
        finally:
            os._exit(code)
    return child
