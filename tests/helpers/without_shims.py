"""Leave out one CPU shim at a time and report whether a run still ends.

`-m tests.helpers.without_shims RESULT.json ARGS`: one process imports Megatron, and for each shim a
fork calls the entry with ARGS and without the shim; RESULT gets {target: exit code}.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from pathlib import Path

from megatron_let import pretrain
from megatron_let.compat.cpu_shims import cpu_shims
from megatron_let.compat.device import detect_host, prepare_process
from tests.helpers.forks import exit_codes_in_forks

SECONDS = 120


def run_without(target: str | None, arguments: list[str], folder: Path) -> int:
    """Return the exit code of a forked run; 1 for an exception, -14 if it hung."""
    return exit_codes_in_forks(functools.partial(_in_child, target, arguments, folder))[0]


def _in_child(target: str | None, arguments: list[str], folder: Path) -> int:
    from megatron_let.compat import apply

    signal.alarm(SECONDS)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    kept = {name: make for name, make in cpu_shims().items() if name != target}
    apply.cpu_shims = lambda: kept
    return pretrain.main([*arguments, "--save", str(folder / str(target).replace(".", "_"))])


if __name__ == "__main__":
    prepare_process(detect_host(), 0)
    import megatron.training  # noqa: F401

    import megatron_let.integration  # noqa: F401

    result, *rest = sys.argv[1:]
    codes = {str(t): run_without(t, rest, Path(result).parent) for t in [None, *cpu_shims()]}
    Path(result).write_text(json.dumps(codes))
