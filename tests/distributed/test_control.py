"""Control files stop a run or make it save, and its checkpoint resumes exactly."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from megatron.core.rerun_state_machine import EXIT_CODE_RESUME_TO_DISAMBIGUATE

from megatron_let.files.names import DONE, SAVE_NOW, STOP, TRACKER
from tests.helpers.runs import Run, largest_difference, train

pytestmark = pytest.mark.distributed

# The checkpoint flags of the paper's recipes; two ranks shard the optimizer's state.
RECIPE = ("--use-distributed-optimizer", "--ckpt-format", "torch_dist", "--async-save",
          "--use-persistent-ckpt-worker", "--async-strategy", "mcore",
          "--eval-interval", 1000)  # fmt: skip


def run_with(folder: Path, teacher: Path, data: Path, *flags: object) -> Run:
    checkpoints = folder / "checkpoints"
    return train(
        folder, "--data-path", data, "--save", checkpoints, "--load", checkpoints,
        "--save-interval", 1000, *RECIPE, *flags, ranks=2, TEACHER=str(teacher),
    )  # fmt: skip


def last_checkpoint(folder: Path) -> int:
    return int((folder / "checkpoints" / TRACKER).read_text())


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path
) -> tuple[Run, Path]:
    """A run with a SAVE_NOW file, and its folder."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / SAVE_NOW).touch()
    return run_with(folder, teacher, data), folder


@pytest.fixture(scope="module")
def stopped(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path
) -> tuple[Run, Path]:
    """A run with a STOP file, which ends after its first step, and its folder."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / STOP).touch()
    return run_with(folder, teacher, data), folder


def test_save_now_saves_once_and_training_continues(uninterrupted: tuple[Run, Path]) -> None:
    run, folder = uninterrupted
    saved = sorted(path.name for path in (folder / "checkpoints").glob("iter_*"))
    assert saved == ["iter_0000001", "iter_0000010"]
    assert [row["iteration"] for row in run.steps] == list(range(1, 11))
    assert not (folder / "checkpoints" / SAVE_NOW).exists()


def test_finished_run_has_done_file(uninterrupted: tuple[Run, Path]) -> None:
    assert (uninterrupted[1] / "checkpoints" / DONE).read_text() == "10\n"


def test_stop_saves_and_ends_the_run(stopped: tuple[Run, Path]) -> None:
    run, folder = stopped
    assert [row["iteration"] for row in run.steps] == [1]
    assert last_checkpoint(folder) == 1
    assert (folder / "checkpoints" / STOP).exists(), "the launcher has to find it"
    assert not (folder / "checkpoints" / DONE).exists()


def test_stopped_run_resumes_with_the_same_losses(
    uninterrupted: tuple[Run, Path], stopped: tuple[Run, Path], teacher: Path, data: Path
) -> None:
    _, folder = stopped
    (folder / "checkpoints" / STOP).unlink()
    resumed = run_with(folder, teacher, data)
    assert [row["iteration"] for row in resumed.steps] == list(range(1, 11))
    for key in ("lm_loss", "grad_norm"):
        assert largest_difference(resumed, uninterrupted[0], key) == 0.0, key


@pytest.mark.parametrize("sharded", [True, False])
def test_rate_changes_on_resume_if_it_is_overridden(
    sharded: bool, tmp_path: Path, teacher: Path, data: Path
) -> None:
    """Both kinds of optimizer; stock Megatron 0.19.2 loads neither with another --lr."""
    checkpoints = tmp_path / "checkpoints"
    flags = ("--data-path", data, "--save", checkpoints, "--load", checkpoints, "--save-interval",
             2, "--lr-decay-style", "constant", "--lr-warmup-iters", 0, "--eval-iters", 0,
             *(["--use-distributed-optimizer"] if sharded else []))  # fmt: skip
    train(tmp_path, *flags, "--train-iters", 2, TEACHER=str(teacher))
    resumed = train(
        tmp_path, *flags, "--train-iters", 4, "--lr", 7e-3, "--min-lr", 7e-4,
        "--override-opt_param-scheduler", TEACHER=str(teacher),
    )  # fmt: skip
    assert [row["learning_rate"] for row in resumed.steps] == [1e-3, 1e-3, 7e-3, 7e-3]
    changed = [row["changed"] for row in resumed.rows if "changed" in row]
    assert changed == [{"train_iters": [2, 4], "lr": [1e-3, 7e-3], "min_lr": [1e-4, 7e-4]}]
    # The optimizer's state was loaded: without it the loss would jump.
    assert resumed.steps[2]["lm_loss"] == pytest.approx(resumed.steps[1]["lm_loss"], abs=0.1)


def test_rejected_result_ends_a_run_without_save(tmp_path: Path, teacher: Path, data: Path) -> None:
    run = train(
        tmp_path, "--data-path", data, "--lr", 1e30, "--clip-grad", 0, "--lr-warmup-iters", 0,
        TEACHER=str(teacher), check=False,
    )  # fmt: skip
    # The starter of the ranks returns 1 and prints the rank's code, as torchrun does.
    assert run.returncode == 1
    assert re.search(rf"code\s*:? {EXIT_CODE_RESUME_TO_DISAMBIGUATE}\b", run.log)
    assert "nothing is saved without --save" in run.log and "TypeError" not in run.log


def test_sharded_optimizer_resumes_in_another_layout(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    common = (
        "--data-path", data, "--load", checkpoints, "--eval-iters", 0, "--ckpt-format",
        "torch_dist", "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable",
    )  # fmt: skip
    saved = train(
        tmp_path / "saved", *common, "--save", checkpoints, "--save-interval", 5, ranks=2,
        TEACHER=str(teacher),
    )  # fmt: skip
    shutil.rmtree(checkpoints / "iter_0000010")
    (checkpoints / TRACKER).write_text("5")
    resumed = train(
        tmp_path / "resumed", *common, "--tensor-model-parallel-size", 2, "--sequence-parallel",
        ranks=2, TEACHER=str(teacher),
    )  # fmt: skip
    assert [row["iteration"] for row in resumed.steps] == [6, 7, 8, 9, 10]
    for key in ("lm_loss", "grad_norm"):
        expected = [row[key] for row in saved.steps[5:]]
        assert [row[key] for row in resumed.steps] == pytest.approx(expected, rel=1e-5), key
