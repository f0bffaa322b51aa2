"""Child processes of the commands that train on this machine: their end, their log, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from megatron_let.cli.local_run import (
    interruptible,
    next_line,
    run_command_line,
    run_environment,
)
from megatron_let.errors import LETError


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_failed_command_names_first_error_of_this_call_and_log(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("ValueError: of an earlier call\n")
    code = "print('x'); print('plan: error: bad'); print('later: error: y'); raise SystemExit(3)"
    with pytest.raises(LETError, match=f"convert run failed: plan: error: bad .*{log}"):
        run_command_line("convert", python(code), os.environ, log, None)


def test_output_goes_to_log_and_only_verbose_shows_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "a.log"
    code = "import sys; print('out'); print('err', file=sys.stderr)"
    run_command_line("a", python(code), os.environ, log, None)
    assert capfd.readouterr() == ("", "")
    assert sorted(log.read_text().split()) == ["err", "out"]
    run_command_line("a", python(code), os.environ, log, Console(width=80))
    assert sorted(capfd.readouterr().out.split()) == ["err", "out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_interrupts_and_a_second_does_not(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with interruptible():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(5)
        os.kill(os.getpid(), number)
        time.sleep(0.1)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("steps", [20, 256, 1792])
def test_progress_lines_are_a_tenth_of_the_run_apart(steps: int) -> None:
    printed = [2]
    while printed[-1] < steps and len(printed) < 20:
        printed.append(next_line(printed[-1], steps))
    assert printed == sorted(set(printed)) and printed[-1] == steps
    assert 10 <= len(printed) <= 11


def pids(log: Path) -> list[int]:
    return [int(word) for word in log.read_text().split()]


def runs(pid: int) -> bool:
    """Return whether a process exists and is no orphan that init has yet to reap."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_interrupted_command_ends_its_child_and_grandchild(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path\n"
        "from megatron_let.cli.common import run_command\n"
        "from megatron_let.cli.local_run import *\n"
        "child = ['bash', '-c', 'sleep 60 & echo $$ $!; wait']\n"
        "def body(console):\n"
        "    run_command_line('a', child, os.environ, Path('log'), None)\n"
        "    return 0\n"
        "with interruptible():\n"
        "    sys.exit(run_command('command', body, 'interrupted; go on'))\n"
    )
    parent = subprocess.Popen(
        python(code), cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    log = tmp_path / "log"
    while not (log.is_file() and log.read_text().endswith("\n")):
        time.sleep(0.05)
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=30)
    assert parent.returncode == 130 and errors == "command: interrupted; go on\n"
    # The grandchild has the signal, and may take a moment to end.
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(runs, pids(log))):
        time.sleep(0.05)
    assert len(pids(log)) == 2 and not any(map(runs, pids(log)))


def test_processes_share_the_cores_unless_threads_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_environment(tmp_path, tmp_path, 2)["OMP_NUM_THREADS"] == "3"
    assert run_environment(tmp_path, tmp_path, 8)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert run_environment(tmp_path, tmp_path, 2)["OMP_NUM_THREADS"] == "5"
