"""Experts, latent attention and multi-token prediction: one process, stock Megatron, references."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.test_layout_matrix import CP2, PP2, SP, TP2, VPP2, _assert_same
from tests.distributed.test_training import COMMON, USER_SCRIPT
from tests.helpers.runs import Run, run_forked, train
from tests.helpers.tensorboard import scalars

pytestmark = pytest.mark.distributed

EP2 = ("--expert-model-parallel-size", 2)
ALL_TO_ALL = ("--moe-token-dispatcher-type", "alltoall")
PER_TOKEN = ("--calculate-per-token-loss",)

# Both have experts in layer 3; the first in all layers.
STUDENTS: dict[str, tuple[str | int | float, ...]] = {
    "experts": (
        "--num-experts", 4, "--moe-router-topk", 2, "--moe-ffn-hidden-size", 64,
        "--moe-aux-loss-coeff", 0.1, "--moe-z-loss-coeff", 0.01,
    ),
    "latent": (
        "--multi-latent-attention", "--q-lora-rank", 24, "--kv-lora-rank", 16,
        "--qk-head-dim", 16, "--qk-pos-emb-head-dim", 8, "--v-head-dim", 16, "--qk-layernorm",
        "--num-experts", 4, "--moe-layer-freq", "[0,1,1,1]", "--moe-ffn-hidden-size", 64,
        "--moe-shared-expert-intermediate-size", 32, "--moe-router-score-function", "sigmoid",
        "--moe-router-enable-expert-bias", "--moe-router-num-groups", 2,
        "--moe-router-group-topk", 1, "--moe-router-topk-scaling-factor", 2.5,
        "--moe-router-load-balancing-type", "seq_aux_loss", "--moe-aux-loss-coeff", 0.01,
        "--mtp-num-layers", 1,
    ),
}  # fmt: skip
# (student, k, ranks, flags); the reference is one process with the same k.
LAYOUTS = {
    "ep2": ("experts", 3, 2, (*EP2, *ALL_TO_ALL)),
    "ep2-tp2-sp": ("experts", 3, 4, (*EP2, *TP2, *SP)),
    "latent-tp2-sp": ("latent", 3, 2, (*TP2, *SP)),
    # The layers of multi-token prediction follow, with numbers of their own.
    "latent-pp2-last-layer": ("latent", 4, 2, (*PP2, "--let-layer", "last")),
}
SLOW = {
    "ep2-pp2": ("experts", 3, 4, (*EP2, *PP2, *ALL_TO_ALL)),
    "cp2": ("experts", 3, 2, CP2),
    "ep2-etp1-tp2-sp": (
        "experts", 3, 4, (*EP2, *TP2, *SP, *ALL_TO_ALL, "--expert-tensor-parallel-size", 1),
    ),
    "ep2-distributed-optimizer": (
        "experts", 3, 2, (*EP2, *ALL_TO_ALL, "--use-distributed-optimizer"),
    ),
    "latent-ep2": ("latent", 3, 2, EP2),
    "latent-vpp2": ("latent", 3, 2, (*PP2, *VPP2)),
    "latent-ep2-pp2-first-stage": ("latent", 1, 4, (*EP2, *PP2)),
    "latent-recompute": (
        "latent", 3, 1, ("--recompute-granularity", "selective", "--recompute-modules", "moe"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def student_weights(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path):  # type: ignore[no-untyped-def]
    """Checkpoints of the students after ten steps of one process, whose cosine is above 0."""
    folders: dict[str, Path] = {}

    def get(student: str) -> Path:
        if student not in folders:
            folders[student] = tmp_path_factory.mktemp("weights")
            train(
                folders[student], "--data-path", data, "--save", folders[student] / "checkpoint",
                "--save-interval", 10, "--train-iters", 10, "--eval-iters", 0, "--lr", 1e-2,
                "--let-weight", 20, "--let-stop-step", 100, *STUDENTS[student],
                TEACHER=str(teacher),
            )  # fmt: skip
        return folders[student] / "checkpoint"

    return get


@pytest.fixture(scope="module")
def run_student(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path, student_weights
):  # type: ignore[no-untyped-def]
    """Train five steps from a student's weights; each run once."""
    runs: dict[tuple[object, ...], Run] = {}

    def run(student: str, layer: int, ranks: int, *flags: str | int) -> Run:
        key = (student, layer, ranks, *flags)
        if key not in runs:
            runs[key] = train(
                tmp_path_factory.mktemp("run"), "--data-path", data,
                "--load", student_weights(student), "--finetune", "--no-load-optim",
                "--no-load-rng", "--train-iters", 5, "--eval-iters", 0, "--let-layer", layer,
                "--let-weight", 0.5, "--let-stop-step", 10, *STUDENTS[student], *flags,
                ranks=ranks, TEACHER=str(teacher),
            )  # fmt: skip
        return runs[key]

    return run


@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS.values(), *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW.values())],
    ids=[*LAYOUTS, *SLOW],
)
def test_layout_matches_one_process(layout: tuple, run_student) -> None:  # type: ignore[no-untyped-def, type-arg]
    student, layer, ranks, flags = layout
    _assert_same(run_student(student, layer, ranks, *flags), run_student(student, layer, 1))


@pytest.mark.slow
def test_experts_with_per_token_loss_match_one_process(run_student) -> None:  # type: ignore[no-untyped-def]
    ours = run_student("experts", 3, 2, *EP2, *ALL_TO_ALL, *PER_TOKEN)
    _assert_same(ours, run_student("experts", 3, 1, *PER_TOKEN))


@pytest.mark.slow
@pytest.mark.parametrize("student", STUDENTS)
def test_random_weights_on_two_ranks_are_those_of_one_process(
    student: str, tmp_path: Path, teacher: Path, data: Path
) -> None:
    flags = ("--data-path", data, "--train-iters", 2, "--eval-iters", 0, "--let-weight", 2,
             *STUDENTS[student])  # fmt: skip
    one = train(tmp_path / "one", *flags, TEACHER=str(teacher))
    two = train(tmp_path / "two", *flags, *EP2, *ALL_TO_ALL, ranks=2, TEACHER=str(teacher))
    _assert_same(two, one)


STEPS = ("--train-iters", 4, "--eval-iters", 0)
# The weight adds nothing to a gradient in fp32, but the whole of LET runs.
VANISHING = ("--let-method", "let", "--let-weight", 1e-30)


@pytest.fixture(scope="module", params=STUDENTS)
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data: Path):  # type: ignore[no-untyped-def]
    """A student, and the TensorBoard folder of a user's script without LET."""
    folder = tmp_path_factory.mktemp("stock")
    code, log = run_forked(
        "tests.helpers.on_cpu", USER_SCRIPT, *COMMON, "--data-path", data, "--tensorboard-dir",
        folder / "tensorboard", *STUDENTS[request.param], *STEPS, folder=folder, LET="0",
        LOCAL_SPEC="1",
    )  # fmt: skip
    assert code == 0, log[-4000:]
    return request.param, folder / "tensorboard"


@pytest.mark.parametrize("flags", [("--let-method", "none"), VANISHING], ids=["none", "vanishing"])
def test_run_is_bitwise_equal_to_stock(
    flags: tuple[str | float, ...],
    stock: tuple[str, Path],
    tmp_path: Path,
    teacher: Path,
    data: Path,
) -> None:
    """LET rescales neither the router's losses nor those of multi-token prediction."""
    student, theirs = stock
    train(
        tmp_path, *COMMON, "--data-path", data, "--tensorboard-dir", tmp_path / "tensorboard",
        *STUDENTS[student], *STEPS, *flags,
        *(("--let-teacher", teacher) if flags == VANISHING else ()), config=None,
    )  # fmt: skip
    extra = {
        "experts": ["load_balancing_loss", "z_loss"],
        "latent": ["seq_load_balancing_loss", "mtp_1 loss"],
    }
    for name in ("lm loss", "grad-norm", *extra[student]):
        ours = scalars(tmp_path / "tensorboard", name)
        assert len(ours) == 4 and ours == scalars(theirs, name), name
