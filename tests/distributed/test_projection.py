"""A learned projection: equal in every layout, resumed exactly, and freed at S_stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_let.checkpoint.convert import to_hugging_face_folder
from megatron_let.checkpoint.describe import describe
from megatron_let.checkpoint.torch_dist import TorchDist
from megatron_let.checkpoint.weights import open_weights
from tests.distributed.test_layout_matrix import LAYOUTS as ALL_LAYOUTS
from tests.distributed.test_layout_matrix import OVERLAP, SP, TP2
from tests.helpers.checkpoints import tensors_of
from tests.helpers.models import save_teacher
from tests.helpers.runs import Run, largest_difference, train

pytestmark = pytest.mark.distributed

LAYOUTS = ALL_LAYOUTS | {"tp2-sp-distributed-optimizer": (2, 3, (*TP2, *SP, *OVERLAP))}
TOLERANCE = 1e-5
SAVED, STOP, END = 3, 6, 8
STATE = {f"let_projection_{name}" for name in ("weight", "exp_avg", "exp_avg_sq", "step")}
NEW = ("--finetune", "--no-load-optim", "--no-load-rng")
FP16 = ("--fp16", "--let-weight", 4)


def run_with(
    folder: Path, teacher: Path, data: Path, load: Path, *flags: object, ranks: int = 1,
    check: bool = True,
) -> Run:  # fmt: skip
    """Train eight steps from the weights in `load`, six of them with the teacher."""
    return train(
        folder, "--data-path", data, "--load", load, "--save", folder / "saved",
        "--save-interval", SAVED, "--train-iters", END, "--eval-iters", 0,
        "--let-projection", "learned", "--let-weight", 0.5, "--let-stop-step", STOP, *flags,
        ranks=ranks, check=check, TEACHER=str(teacher),
    )  # fmt: skip


def checkpoint(folder: Path, iteration: int) -> TorchDist:
    return TorchDist(folder / "saved" / f"iter_{iteration:07d}")


def projection(folder: Path, iteration: int = SAVED) -> dict[str, Tensor]:
    """Return the projection and its moments in the checkpoint of this iteration."""
    saved = checkpoint(folder, iteration)
    return {name: saved.read(name) for name in STATE}


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path, weights: Path
) -> tuple[Run, Path]:
    """A run of one process from start to end, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return run_with(folder, teacher, data, weights, *NEW), folder


def assert_same(run: tuple[Run, Path], expected: tuple[Run, Path]) -> None:
    """Compare losses, gradient norms and cosines of each step, and the saved projection."""
    for key in ("lm_loss", "grad_norm"):
        assert largest_difference(run[0], expected[0], key) < TOLERANCE, key
    # Near 0 at first, so compared with an absolute tolerance.
    ours, theirs = ([row.get("let_cosine", 9.0) for row in r.steps] for r, _ in (run, expected))
    assert ours == pytest.approx(theirs, abs=TOLERANCE) and 9.0 not in ours[:STOP]
    saved, reference = projection(run[1]), projection(expected[1])
    for name in STATE:
        difference = (saved[name] - reference[name]).norm() / reference[name].norm()
        assert difference < TOLERANCE, name


@pytest.mark.parametrize(
    "name",
    [
        # The overlap counts the model's modules, and TP's ranks hold different tokens.
        "tp2-sp-distributed-optimizer",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "dp2-distributed-optimizer", "tp2-sp", "dp2", "tp2", "cp2", "tp2-cp2-sp",
                "pp2-first-stage", "pp2-last-stage", "vpp2", "vpp2-recompute-full",
                "tp2-pp2-sp", "eight-microbatches",
            )
        ),
    ],
)  # fmt: skip
def test_layout_matches_one_process(
    name: str, tmp_path: Path, teacher: Path, data: Path, weights: Path, whole: tuple[Run, Path]
) -> None:
    ranks, layer, flags = LAYOUTS[name]
    expected = whole
    if layer != 3:
        folder = tmp_path / "one process"
        expected = run_with(folder, teacher, data, weights, *NEW, "--let-layer", layer), folder
    flags = (*NEW, "--let-layer", layer, *flags)
    folder = tmp_path / "layout"
    run = run_with(folder, teacher, data, weights, *flags, ranks=ranks)
    assert_same((run, folder), expected)


@pytest.mark.slow
def test_logsum_matches_one_process(tmp_path: Path, data: Path, weights: Path) -> None:
    teacher = save_teacher(tmp_path / "narrow", width=32)
    ranks, _, layout = LAYOUTS["tp2-cp2-sp"]
    runs = []
    for folder, flags, size in ((tmp_path / "1", (), 1), (tmp_path / "4", layout, ranks)):
        flags = (*NEW, "--let-loss", "logsum", *flags)
        runs.append((run_with(folder, teacher, data, weights, *flags, ranks=size), folder))
    assert_same(*runs)


@pytest.mark.slow
def test_per_token_loss_matches_one_process(
    tmp_path: Path, teacher: Path, data: Path, weights: Path
) -> None:
    flags = (*NEW, "--calculate-per-token-loss", "--eod-mask-loss", "--null-tokenizer-eod-id", 249)
    runs = []
    for folder, ranks in ((tmp_path / "1", 1), (tmp_path / "2", 2)):
        runs.append((run_with(folder, teacher, data, weights, *flags, ranks=ranks), folder))
    assert_same(*runs)


def test_projection_changes_and_raises_the_cosine(whole: tuple[Run, Path]) -> None:
    run, folder = whole
    state = projection(folder)
    assert state["let_projection_step"] == SAVED
    assert all(tensor.count_nonzero() for tensor in state.values())
    cosines = [row["let_cosine"] for row in run.steps[:STOP]]
    assert cosines[-1] > cosines[0] + 0.05


def test_checkpoints_hold_projection_until_stop_step(whole: tuple[Run, Path]) -> None:
    names = {i: set(checkpoint(whole[1], i).metadata.state_dict_metadata) for i in (SAVED, STOP)}
    assert names[SAVED] - names[STOP] == STATE and names[STOP] < names[SAVED]
    assert describe(whole[1] / "saved" / f"iter_{SAVED:07d}")["let_projection"] == (48, 64)
    assert describe(whole[1] / "saved")["let_projection"] is None


def test_export_holds_no_projection(whole: tuple[Run, Path], tmp_path: Path) -> None:
    before, after = (
        open_weights(whole[1] / "saved" / f"iter_{iteration:07d}") for iteration in (SAVED, STOP)
    )
    to_hugging_face_folder(before, tmp_path / "before")
    to_hugging_face_folder(after, tmp_path / "after")
    exported = tensors_of(tmp_path / "before")
    assert exported.keys() == tensors_of(tmp_path / "after").keys()
    assert not any("projection" in name for name in exported)


def assert_resumes(
    step: int, whole: tuple[Run, Path], folder: Path, teacher: Path, data: Path, *flags: object,
    ranks: int = 1,
) -> Run:  # fmt: skip
    """Resume from a checkpoint of `whole`; the numbers are bitwise equal."""
    flags = ("--ckpt-step", step, *flags)
    run = run_with(folder, teacher, data, whole[1] / "saved", *flags, ranks=ranks)
    after = {row["iteration"]: row for row in whole[0].steps}
    assert [row["iteration"] for row in run.steps] == list(range(step + 1, END + 1))
    for row in run.steps:
        for key in ("lm_loss", "let_cosine", "grad_norm"):
            assert row.get(key) == after[row["iteration"]].get(key), (row["iteration"], key)
    return run


def test_resumed_run_is_bitwise_equal(
    whole: tuple[Run, Path], tmp_path: Path, teacher: Path, data: Path
) -> None:
    run = assert_resumes(SAVED, whole, tmp_path, teacher, data)
    assert "iter_0000003" in run.log and "newly initialised" not in run.log


@pytest.mark.slow
def test_run_resumed_at_stop_step_is_bitwise_equal(
    whole: tuple[Run, Path], tmp_path: Path, data: Path
) -> None:
    assert_resumes(STOP, whole, tmp_path, Path("/the/teacher/is/gone"), data)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dp2-distributed-optimizer", "tp2-pp2-sp"])
def test_sharded_run_resumes_bitwise_equal(
    name: str, tmp_path: Path, teacher: Path, data: Path, weights: Path
) -> None:
    ranks, layer, flags = LAYOUTS[name]
    flags = ("--let-layer", layer, *flags)
    folder = tmp_path / "sharded"
    run = run_with(folder, teacher, data, weights, *NEW, *flags, ranks=ranks)
    assert_resumes(SAVED, (run, folder), tmp_path / "resumed", teacher, data, *flags, ranks=ranks)


@pytest.mark.slow
def test_projection_can_be_disabled_and_enabled_on_resume(
    whole: tuple[Run, Path], tmp_path: Path, teacher: Path, data: Path
) -> None:
    """A projection that is not requested is ignored; one that is missing is initialised."""
    flags = ("--ckpt-step", SAVED, "--exit-interval", 4, "--save-interval", 1)
    off = run_with(
        tmp_path / "off", teacher, data, whole[1] / "saved", *flags, "--let-projection",
        "interpolate",
    )  # fmt: skip
    assert [row["iteration"] for row in off.steps] == [4]
    on = run_with(tmp_path / "on", teacher, data, tmp_path / "off/saved")
    assert "newly initialised" in on.log
    assert [row["iteration"] for row in on.steps] == [5, 6, 7, 8]


@pytest.mark.slow
def test_projection_of_another_teacher_is_rejected(
    whole: tuple[Run, Path], tmp_path: Path, data: Path
) -> None:
    wider = save_teacher(tmp_path / "wider", width=80)
    flags = ("--ckpt-step", SAVED)
    run = run_with(tmp_path / "run", wider, data, whole[1] / "saved", *flags, check=False)
    assert run.returncode != 0
    assert all(text in run.error for text in ("width 48", "--let-teacher has 80"))


@pytest.mark.slow
def test_projection_does_not_depend_on_the_loss_scale(
    tmp_path: Path, teacher: Path, data: Path, weights: Path
) -> None:
    for scale in (64, 4096):
        flags = (*NEW, *FP16, "--loss-scale", scale)
        run_with(tmp_path / str(scale), teacher, data, weights, *flags)
    ours, theirs = (projection(tmp_path / str(scale)) for scale in (64, 4096))
    moment = "let_projection_exp_avg"
    assert (ours[moment] - theirs[moment]).norm() < 1e-2 * theirs[moment].norm()


@pytest.mark.slow
def test_skipped_steps_do_not_update_the_projection(
    tmp_path: Path, teacher: Path, data: Path, weights: Path
) -> None:
    """The dynamic loss scale starts so high that the first gradients overflow."""
    flags = (*NEW, *FP16, "--initial-loss-scale", 2.0**40, "--hysteresis", 1)
    run = run_with(tmp_path, teacher, data, weights, *flags)
    skipped = run.log.count("number of skipped iterations:   1")
    state = projection(tmp_path)
    assert skipped >= SAVED and state["let_projection_step"] == 0
    assert not state["let_projection_exp_avg"].any() and torch.all(
        state["let_projection_exp_avg_sq"] == 0
    )
