"""One run from start to end: its logs, its checkpoints, and its resume after a kill."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from megatron_let.config.let_config import alignment_weight
from tests.helpers.runs import (
    ROOT,
    Run,
    command,
    environment,
    largest_difference,
    run_forked,
    train,
)
from tests.helpers.tensorboard import scalars

pytestmark = pytest.mark.distributed

COMMON = (
    "--num-layers", 4, "--hidden-size", 64, "--ffn-hidden-size", 176, "--num-attention-heads", 4,
    "--seq-length", 64, "--max-position-embeddings", 64, "--normalization", "RMSNorm", "--swiglu",
    "--disable-bias-linear", "--position-embedding-type", "rope",
    "--untie-embeddings-and-output-weights", "--attention-dropout", 0.0, "--hidden-dropout", 0.0,
    "--tokenizer-type", "NullTokenizer", "--vocab-size", 256, "--make-vocab-size-divisible-by", 64,
    "--split", "90,10,0", "--num-workers", 0, "--micro-batch-size", 2, "--global-batch-size", 8,
    "--train-iters", 10, "--lr", 1e-3, "--min-lr", 1e-4, "--lr-decay-style", "cosine",
    "--lr-warmup-iters", 2, "--weight-decay", 0.01, "--clip-grad", 1.0, "--seed", 1234,
    "--eval-interval", 5, "--eval-iters", 1, "--log-interval", 1, "--adam-beta2", 0.999,
)  # fmt: skip
DOCUMENTS = ("--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss")
PP2 = ("--pipeline-model-parallel-size", 2)
USER_SCRIPT = str(ROOT / "tests/helpers/user_pretrain_gpt.py")
# Environment variable with the seed of the step at which a run is killed; random without it.
KILL_SEED = "KILL_SEED"


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path
) -> tuple[Run, Path]:
    """The tiny recipe from start to end, and its folder."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = train(
        folder, "--data-path", data, "--save", folder / "checkpoints",
        "--load", folder / "checkpoints", "--tensorboard-dir", folder / "tensorboard",
        TEACHER=str(teacher),
    )  # fmt: skip
    return run, folder


def test_metrics_file_has_one_row_per_step(uninterrupted: tuple[Run, Path]) -> None:
    run, _ = uninterrupted
    assert [row["iteration"] for row in run.rows if "lm_loss" in row] == list(range(1, 11))
    common = {"iteration", "lm_loss", "grad_norm", "learning_rate", "step_seconds"}
    common |= {"tokens_per_second", "max_memory_bytes"}
    for row in run.steps:
        aligned = row["iteration"] <= 6
        assert row.keys() == common | ({"let_cosine", "let_weight"} if aligned else set())
        if aligned:
            weight = alignment_weight(row["iteration"] - 1, 0.1, 6)
            assert row["let_weight"] == pytest.approx(weight, rel=1e-6)
    evaluations = [row for row in run.rows if "valid_loss" in row]
    assert [row["iteration"] for row in evaluations] == [5, 10]
    assert all(row.keys() == {"iteration", "valid_loss", "microbatches"} for row in evaluations)


def test_tensorboard_shows_cosine_and_weight(uninterrupted: tuple[Run, Path]) -> None:
    run, folder = uninterrupted
    cosines = scalars(folder / "tensorboard", "let cosine")
    assert list(cosines) == [1, 2, 3, 4, 5, 6]
    for row in run.steps[:6]:
        assert cosines[row["iteration"]] == pytest.approx(row["let_cosine"], rel=1e-6)
    assert scalars(folder / "tensorboard", "let weight")[1] == pytest.approx(0.1)


def test_log_shows_no_cosine_after_the_teacher(uninterrupted: tuple[Run, Path]) -> None:
    run, _ = uninterrupted
    lines = [line for line in run.log.splitlines() if " iteration " in line and "lm loss:" in line]
    assert len(lines) == 10
    assert ["let weight" in line for line in lines] == [True] * 6 + [False] * 4
    assert "the teacher is freed" in run.log


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), id="let"),
        pytest.param(("--let-method", "salt"), id="salt"),
        pytest.param(
            ("--let-projection", "learned"), id="learned projection", marks=pytest.mark.slow
        ),
    ],
)
def test_teacher_is_freed_at_stop_step(
    flags: tuple[str, ...], tmp_path: Path, teacher: Path, data: Path
) -> None:
    run = train(
        tmp_path, "--data-path", data, "--train-iters", 4, "--let-stop-step", 2, *flags,
        module="tests.helpers.freed_teacher", TEACHER=str(teacher),
    )  # fmt: skip
    assert len(run.steps) == 4


@pytest.mark.parametrize("flags", [(), DOCUMENTS], ids=["", "documents"])
def test_no_value_is_read_from_the_device_within_a_global_batch(
    flags: tuple[str, ...], tmp_path: Path, teacher: Path, documents: Path
) -> None:
    train(
        tmp_path, "--data-path", documents, "--train-iters", 3, "--let-projection", "learned",
        *flags,
        module="tests.helpers.host_reads", TEACHER=str(teacher),
    )  # fmt: skip


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """TensorBoard folder of a user's script without LET."""
    folder = tmp_path_factory.mktemp("stock")
    _user_script(folder, data, LET="0", torchrun=True)
    return folder / "tensorboard"


def _user_script(
    folder: Path,
    data: Path,
    *flags: object,
    ranks: int = 1,
    torchrun: bool = False,
    **variables: str,
) -> None:
    """Run the user's script as forks, or under torchrun as a user does."""
    argv = [
        USER_SCRIPT, *map(str, COMMON), "--data-path", str(data), "--tensorboard-dir",
        str(folder / "tensorboard"), *map(str, flags),
    ]  # fmt: skip
    variables["LOCAL_SPEC"] = "1"
    if torchrun:
        script = [*command(ranks, "tests.helpers.on_cpu"), *argv]
        subprocess.run(script, cwd=folder, env=environment(**variables), check=True, timeout=300)
    else:
        code, log = run_forked(
            "tests.helpers.on_cpu", *argv, folder=folder, ranks=ranks, **variables
        )
        assert code == 0, log[-4000:]


@pytest.mark.parametrize(
    "flags",
    [("--let-method", "none"), ("--let-method", "let", "--let-weight", 0)],
    ids=["method none", "weight 0"],
)
def test_run_without_let_is_bitwise_equal_to_stock(
    flags: tuple[object, ...], tmp_path: Path, teacher: Path, data: Path, stock: Path
) -> None:
    teacher_flags = ("--let-teacher", teacher) if "let" in flags else ()
    train(
        tmp_path, *COMMON, "--data-path", data, "--tensorboard-dir", tmp_path / "tensorboard",
        *flags, *teacher_flags, config=None,
    )  # fmt: skip
    for name in ("lm loss", "grad-norm"):
        ours = scalars(tmp_path / "tensorboard", name)
        assert ours and ours == scalars(stock, name), name
    # Stock Megatron's second evaluation is of other text than the first.
    ours, theirs = (
        scalars(folder, "lm loss validation") for folder in (tmp_path / "tensorboard", stock)
    )
    assert (ours.keys(), ours[5]) == (theirs.keys(), theirs[5])


def test_documents_without_let_are_bitwise_those_of_stock(tmp_path: Path, documents: Path) -> None:
    # Learned positions, because rotary embeddings do not read the position ids.
    flags = (*DOCUMENTS, "--position-embedding-type", "learned_absolute")
    stock = tmp_path / "stock"
    stock.mkdir()
    _user_script(stock, documents, *flags, LET="0")
    train(
        tmp_path, *COMMON, "--data-path", documents, "--tensorboard-dir", tmp_path / "tensorboard",
        *flags, "--let-method", "none", config=None,
    )  # fmt: skip
    for name in ("lm loss", "grad-norm"):
        ours = scalars(tmp_path / "tensorboard", name)
        assert ours and ours == scalars(stock / "tensorboard", name), name


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((), id="1"),
        pytest.param(PP2, id="pp2"),
        pytest.param((*PP2, *DOCUMENTS), id="pp2, documents", marks=pytest.mark.slow),
    ],
)
def test_user_script_with_three_lines_matches_entry(
    layout: tuple[object, ...], tmp_path: Path, teacher: Path, documents: Path
) -> None:
    ranks, data = 2 if layout else 1, documents
    let = ("--let-method", "let", "--let-teacher", teacher, "--let-teacher-dtype", "fp32",
           "--let-stop-step", 6, *layout)  # fmt: skip
    ours = train(tmp_path / "ours", *COMMON, "--data-path", data, *let, config=None, ranks=ranks)
    metrics = tmp_path / "theirs.jsonl"
    _user_script(
        tmp_path, data, *let, "--let-metrics-path", metrics, ranks=ranks, torchrun=ranks > 1,
        LET="1",
    )  # fmt: skip
    theirs = Run(0, "", metrics)
    for key in ("lm_loss", "let_cosine", "grad_norm"):
        assert largest_difference(ours, theirs, key) == 0.0


def test_checkpoint_holds_no_teacher(
    uninterrupted: tuple[Run, Path], tmp_path: Path, data: Path
) -> None:
    _, folder = uninterrupted
    train(
        tmp_path, "--data-path", data, "--let-method", "none", "--train-iters", 5,
        "--save", tmp_path / "checkpoints", TEACHER="unused",
    )  # fmt: skip
    with_let, without = (
        dcp.FileSystemReader(f / "checkpoints" / "iter_0000005").read_metadata()
        for f in (folder, tmp_path)
    )
    assert with_let.state_dict_metadata.keys() == without.state_dict_metadata.keys()


def test_let_can_be_disabled_and_enabled_on_resume(
    uninterrupted: tuple[Run, Path], tmp_path: Path, teacher: Path, data: Path
) -> None:
    _, folder = uninterrupted
    off = train(
        tmp_path / "off", "--data-path", data, "--let-method", "none", "--ckpt-step", 5,
        "--load", folder / "checkpoints", "--save", tmp_path / "off-checkpoints",
        "--save-interval", 3, "--exit-interval", 6, TEACHER="unused",
    )  # fmt: skip
    assert [row["iteration"] for row in off.steps] == [6]
    assert "let_cosine" not in off.steps[0]
    on = train(
        tmp_path / "on", "--data-path", data, "--load", tmp_path / "off-checkpoints",
        "--let-stop-step", 8, TEACHER=str(teacher),
    )  # fmt: skip
    assert [row["iteration"] for row in on.steps] == [7, 8, 9, 10]
    assert ["let_cosine" in row for row in on.steps] == [True, True, False, False]
    assert on.steps[0]["let_weight"] == pytest.approx(0.1 * 2 / 8)


def test_resumed_past_stop_step_needs_no_teacher(
    uninterrupted: tuple[Run, Path], tmp_path: Path, data: Path
) -> None:
    _, folder = uninterrupted
    run = train(
        tmp_path, "--data-path", data, "--load", folder / "checkpoints", "--train-iters", 12,
        "--override-opt_param-scheduler", TEACHER="/the/teacher/is/gone",
    )  # fmt: skip
    assert [row["iteration"] for row in run.steps] == [11, 12]
    assert "on the stage of layer" not in run.log


def test_killed_run_resumes_with_the_same_losses(
    uninterrupted: tuple[Run, Path], tmp_path: Path, teacher: Path, data: Path
) -> None:
    reference, _ = uninterrupted
    checkpoints = tmp_path / "checkpoints"
    flags = ("--data-path", data, "--save", checkpoints, "--load", checkpoints,
             "--save-interval", 2)  # fmt: skip
    metrics = tmp_path / "metrics.jsonl"
    # The kill may fall before a checkpoint, within one, or in the middle of a step.
    seed = int(os.environ.get(KILL_SEED) or random.SystemRandom().randrange(10**6))
    kill_at = random.Random(seed).randint(3, 8)
    run = f"{KILL_SEED}={seed}, killed at iteration {kill_at}"
    print(run)
    _kill_at(kill_at, metrics, tmp_path, teacher, flags)
    resumed = train(tmp_path, *flags, TEACHER=str(teacher))
    assert [row["iteration"] for row in resumed.steps] == list(range(1, 11)), run
    for key in ("lm_loss", "let_cosine", "grad_norm", "learning_rate"):
        assert largest_difference(resumed, reference, key) == 0.0, f"{key}; {run}"


def _kill_at(
    iteration: int, metrics: Path, folder: Path, teacher: Path, flags: tuple[object, ...]
) -> None:
    """Start the entry and kill its process group once this iteration is in the metrics."""
    process = subprocess.Popen(
        [*command(1), "--config", str(ROOT / "configs/tiny.yaml"),
         "--let-metrics-path", str(metrics), *map(str, flags)],
        cwd=folder, env=environment(TEACHER=str(teacher)), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(Run(0, "", metrics).steps) < iteration:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def salt(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> tuple[Run, Path]:
    """A SALT run whose teacher is freed after four steps, and its folder."""
    folder = tmp_path_factory.mktemp("salt")
    return _salt(folder, data, teacher), folder


def _salt(folder: Path, data: Path, teacher: Path, *flags: object) -> Run:
    return train(
        folder, "--data-path", data, "--save", folder / "checkpoints",
        "--load", folder / "checkpoints", "--save-interval", 2, "--let-method", "salt",
        "--let-stop-step", 4, *flags, TEACHER=str(teacher),
    )  # fmt: skip


def test_salt_distills_until_stop_step_and_then_trains_alone(salt: tuple[Run, Path]) -> None:
    run, _ = salt
    assert ["kd_loss" in row for row in run.steps] == [True] * 4 + [False] * 6
    assert [row.get("let_weight") for row in run.steps] == [0.5] * 4 + [None] * 6
    assert "the teacher is freed" in run.log
    assert [row["iteration"] for row in run.rows if "valid_loss" in row] == [5, 10]


def test_checkpoint_of_salt_holds_no_teacher(
    salt: tuple[Run, Path], uninterrupted: tuple[Run, Path]
) -> None:
    ours, theirs = (
        dcp.FileSystemReader(f / "checkpoints" / name).read_metadata().state_dict_metadata.keys()
        for f, name in ((salt[1], "iter_0000002"), (uninterrupted[1], "iter_0000010"))
    )
    assert ours == theirs


@pytest.mark.parametrize("step", [2, 6], ids=["with the teacher", "without"])
def test_salt_resumes_with_the_same_losses(
    step: int, salt: tuple[Run, Path], tmp_path: Path, teacher: Path, data: Path
) -> None:
    run, folder = salt
    gone = Path("/the/teacher/is/gone")
    resumed = train(
        tmp_path, "--data-path", data, "--load", folder / "checkpoints", "--ckpt-step", step,
        "--let-method", "salt", "--let-stop-step", 4, TEACHER=str(teacher if step < 4 else gone),
    )  # fmt: skip
    assert [row["iteration"] for row in resumed.steps] == list(range(step + 1, 11))
    after = {row["iteration"]: row for row in run.steps}
    for row in resumed.steps:
        for key in ("lm_loss", "kd_loss", "grad_norm"):
            assert row.get(key) == after[row["iteration"]].get(key), key


def test_fp16_numbers_do_not_depend_on_loss_scale(
    tmp_path: Path, teacher: Path, data: Path, weights: Path
) -> None:
    runs = [
        train(
            tmp_path / str(scale),
            "--data-path",
            data,
            "--load",
            weights,
            "--finetune",
            "--no-load-optim",
            "--no-load-rng",
            "--train-iters",
            5,
            "--eval-iters",
            0,
            "--let-weight",
            0.5,
            "--let-stop-step",
            10,
            "--fp16",
            "--loss-scale",
            scale,
            TEACHER=str(teacher),
        )
        for scale in (64, 4096)
    ]
    for key in ("lm_loss", "let_cosine", "grad_norm"):
        assert largest_difference(runs[0], runs[1], key) < 1e-3, key


def test_quickstart_refuses_a_folder_of_other_files(tmp_path: Path) -> None:
    shutil.copy(__file__, tmp_path)
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools/quickstart.py"), "--output", str(tmp_path)],
        capture_output=True, text=True, env=environment(), timeout=60,
    )  # fmt: skip
    assert result.returncode == 2
    assert "is not empty" in result.stderr
