"""The asynchronous checkpoint writer outlives the run's signals, and its death ends the run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_let.files.names import TRACKER
from tests.helpers.runs import ROOT, command, environment, train

pytestmark = pytest.mark.distributed

# The settings of the paper's recipes; a run of thousands of steps that a signal has to end.
RECIPE = ("--use-distributed-optimizer", "--ckpt-format", "torch_dist", "--async-save",
          "--use-persistent-ckpt-worker", "--async-strategy", "mcore", "--exit-signal-handler",
          "--eval-interval", "100000", "--train-iters", "100000")  # fmt: skip


class LongRun:
    """A run of two ranks under torchrun."""

    def __init__(self, folder: Path, data: Path, teacher: Path, *flags: str) -> None:
        self.tracker = folder / "checkpoints" / TRACKER
        self._log = folder / "log"
        checkpoints = str(folder / "checkpoints")
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [*command(2), "--config", str(ROOT / "configs/tiny.yaml"), "--data-path", str(data),
                 "--save", checkpoints, "--load", checkpoints, *RECIPE, *flags],
                cwd=folder, env=environment(TEACHER=str(teacher)), stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def saved(self) -> int:
        return int(self.tracker.read_text()) if self.tracker.exists() else 0

    def descendants(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []

    def writers(self) -> list[psutil.Process]:
        """Return the processes that multiprocessing spawned for the ranks' writers."""
        spawned = [p for p in self.descendants() if "spawn_main" in " ".join(p.cmdline())]
        return [p for p in spawned if "resource_tracker" not in " ".join(p.cmdline())]

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._process.poll() is None, self.log[-4000:]
            assert time.monotonic() < deadline, self.log[-4000:]
            time.sleep(0.1)

    def signal_torchrun(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> int:
        return self._process.wait(seconds)

    def kill(self) -> None:
        for process in [*self.descendants(), self._process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def long_run(folder: Path, data: Path, teacher: Path, *flags: str) -> Iterator[LongRun]:
    run = LongRun(folder, data, teacher, *flags)
    try:
        yield run
    finally:
        run.kill()


def test_killed_writer_ends_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    with long_run(tmp_path, data, teacher, "--save-interval", "3") as run:
        run.until(lambda: run.saved > 0)
        processes = run.descendants()
        run.writers()[0].kill()
        start = time.monotonic()
        assert run.wait(60) == 1
        # Of these, torchrun takes some to end the other rank.
        assert time.monotonic() - start < 30
        assert "checkpoint writer" in run.log and "exit code -9" in run.log
        saved = run.saved
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive, "processes of the run are left"
    assert_resumes(tmp_path, data, teacher, saved)


def test_sigterm_to_torchrun_saves_and_the_run_resumes(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    with long_run(tmp_path, data, teacher, "--save-interval", "100000") as run:
        run.until(lambda: " iteration        3/" in run.log)
        processes = run.descendants()
        run.signal_torchrun()
        run.wait(60)
        assert run.saved >= 3, run.log[-4000:]
        saved = run.saved
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive, "processes of the run are left"
    assert_resumes(tmp_path, data, teacher, saved)


def assert_resumes(folder: Path, data: Path, teacher: Path, saved: int) -> None:
    """Load the last complete checkpoint, take one step and save."""
    checkpoints = folder / "checkpoints"
    run = train(
        folder, "--data-path", data, "--load", checkpoints, "--save", checkpoints, *RECIPE,
        "--save-interval", 100000, "--exit-interval", saved + 1, ranks=2, TEACHER=str(teacher),
    )  # fmt: skip
    assert [row["iteration"] for row in run.steps] == [saved + 1]
    assert int((checkpoints / TRACKER).read_text()) == saved + 1


@pytest.mark.slow
def test_writer_of_a_killed_rank_does_not_remain(tmp_path: Path, data: Path, teacher: Path) -> None:
    with long_run(tmp_path, data, teacher, "--save-interval", "100000") as run:
        run.until(lambda: " iteration        3/" in run.log)
        processes = run.descendants()
        run.writers()[0].parent().kill()
        assert run.wait(60) == 1
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive, "processes of the run are left"
