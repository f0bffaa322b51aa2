"""A function called in a fork of this process, with everything imported already."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable


def exit_code_in_fork(function: Callable[[], int]) -> int:
    """The code that `function` returned in a fork; 1 for an exception, -N for signal N."""
    child = os.fork()
    if child == 0:
        os.setsid()
        code = 1
        try:
            code = function()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    # A checkpoint writer outlives a process that leaves by _exit.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)
