"""Child processes of the commands that train on this machine: their end, their log, signals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from megatron_let.cli import local_run
from megatron_let.cli.local_run import (
    Trainer,
    export,
    interruptible,
    next_line,
    run_command_line,
    run_environment,
)
from megatron_let.config.recipes import find_recipe
from megatron_let.errors import LETError
from megatron_let.files.names import METRICS, TRACKER
from megatron_let.metrics.sweep import SweepRun


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


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A folder with the data, a teacher, and the first step of a run with them."""
    (tmp_path / "data").mkdir()
    for part in ("train", "valid"):
        (tmp_path / f"data/{part}_text_document.bin").write_bytes(b"tokens")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/config.json").write_text("{}")
    folder = tmp_path / "runs/let/seed-1"
    folder.mkdir(parents=True)
    trainer_of(tmp_path).record(folder, sweep_run())
    (folder / METRICS).write_text('{"iteration": 1, "lm_loss": 5.0}\n')
    return tmp_path


def trainer_of(folder: Path) -> Trainer:
    return Trainer(run_environment(folder / "data", folder / "teacher"), Console())


def sweep_run(*flags: str) -> SweepRun:
    return SweepRun(
        "let", 1, find_recipe(Path("quickstart_let")), ("--seed", "1", "--lr", "0.0010", *flags)
    )


@pytest.mark.parametrize(
    "flags",
    [
        ("--lr", "1e-3"), ("--micro-batch-size", "1"), ("--log-interval", "7"),
        ("--no-save-optim",), ("--recompute-granularity", "full"), ("--wandb-project", "x"),
    ],
)  # fmt: skip
def test_run_continues_with_settings_that_may_change(begun: Path, flags: tuple[str, ...]) -> None:
    trainer_of(begun).check({begun / "runs/let/seed-1": sweep_run(*flags)})


def test_settings_of_a_recipe_are_compared_by_value(begun: Path) -> None:
    def run(weight: str, *flags: str) -> SweepRun:
        recipe = begun / f"{weight}.yaml"
        recipe.write_text(f"all:\n  train-iters: 5\n  let-weight: {weight}\n  swiglu: true\n")
        return SweepRun("let", 1, recipe, flags)

    trainer, folder = trainer_of(begun), begun / "runs/let/seed-1"
    trainer.record(folder, run("0.1"))
    for same in (run("0.10"), run("0.2", "--let-weight", "1e-1"), run("0.1", "--swiglu")):
        trainer.check({folder: same})
    for other in (run("0.2"), run("0.1", "--let-weight", "0")):
        with pytest.raises(LETError, match=r"let-weight is 0\.1 there"):
            trainer.check({folder: other})


@pytest.mark.parametrize(
    "flags",
    [("--lr", "2e-3"), ("--let-loss", "cosine"), ("--train-iters", "9"), ("--let-teacher", "x")],
)
def test_run_of_other_settings_is_refused(begun: Path, flags: tuple[str, ...]) -> None:
    with pytest.raises(LETError, match=f"{flags[0][2:]} is .* there and .* here"):
        trainer_of(begun).check({begun / "runs/let/seed-1": sweep_run(*flags)})


def test_run_is_the_same_in_another_place_and_another_with_other_content(begun: Path) -> None:
    moved = begun.rename(begun.with_name(f"{begun.name}-moved"))
    runs = {moved / "runs/let/seed-1": sweep_run()}
    trainer_of(moved).check(runs)
    for file in ("data/train_text_document.bin", "teacher/config.json"):
        content = (moved / file).read_bytes()
        (moved / file).write_bytes(content[::-1])
        with pytest.raises(LETError, match="holds another run"):
            trainer_of(moved).check(runs)
        (moved / file).write_bytes(content)


def test_finished_student_of_a_teacher_that_was_trained_again_is_refused(begun: Path) -> None:
    model, folder = begun / "runs/teachers/small/model", begun / "runs/let/seed-1"
    student = sweep_run("--let-teacher", str(model))
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"first")
    trainer_of(begun).record(folder, student)
    trainer_of(begun).check({folder: student})
    (model / "model.safetensors").write_bytes(b"other")
    with pytest.raises(LETError, match="let-teacher is model#"):
        trainer_of(begun).check({folder: student})
    # Before it is trained again, nothing is known of it.
    shutil.rmtree(model)
    trainer_of(begun).check({folder: student})


def test_model_older_than_its_checkpoint_is_exported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[object] = []
    monkeypatch.setattr(local_run, "run_subcommand", lambda words, *_: exported.append(words))
    tracker, made = tmp_path / "checkpoints" / TRACKER, tmp_path / "model/config.json"
    for file, seconds in ((tracker, 10), (made, 20)):
        file.parent.mkdir()
        file.touch()
        os.utime(file, (seconds, seconds))
    export(tmp_path, made.parent, tmp_path / "log", None)
    assert not exported
    os.utime(tracker, (30, 30))
    export(tmp_path, made.parent, tmp_path / "log", None)
    assert len(exported) == 1
