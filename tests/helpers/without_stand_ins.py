"""Leave out one CPU stand-in at a time and see whether a run still ends.

`-m tests.helpers.without_stand_ins RESULT.json ARGS`: one process imports Megatron, a fork for each
stand-in calls the entry with ARGS and without it; RESULT gets {target: exit code}.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from pathlib import Path

from megatron_let import pretrain
from megatron_let.compat.device import detect_host, prepare_process
from tests.helpers.forks import exit_code_in_fork

SECONDS = 120


def run_without(target: str | None, arguments: list[str], folder: Path) -> int:
    """Exit code of a forked run; 1 for an exception, -14 if it hung."""
    return exit_code_in_fork(functools.partial(_in_child, target, arguments, folder))


def _in_child(target: str | None, arguments: list[str], folder: Path) -> int:
    from megatron_let.compat import apply
    from megatron_let.compat import cpu_shims as cpu

    signal.alarm(SECONDS)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    kept = {name: make for name, make in cpu.stand_ins().items() if name != target}
    apply.stand_ins = lambda: kept  # type: ignore[assignment]
    return pretrain.main([*arguments, "--save", str(folder / str(target).replace(".", "_"))])


if __name__ == "__main__":
    prepare_process(detect_host(), 0)
    import megatron.training  # noqa: F401

    import megatron_let.integration  # noqa: F401
    from megatron_let.compat import cpu_shims as cpu

    result, *rest = sys.argv[1:]
    targets = [None, *cpu.stand_ins()]
    codes = {str(t): run_without(t, rest, Path(result).parent) for t in targets}
    Path(result).write_text(json.dumps(codes))
