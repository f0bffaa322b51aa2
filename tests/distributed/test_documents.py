"""Rows of several documents: each layout, also a pipeline's middle stages, gives the numbers of
one process, which test_against_plain_reference.py compares with each document alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.test_layout_matrix import (
    CP2,
    FULL,
    KEYS,
    PER_TOKEN,
    PP2,
    RKD,
    SP,
    TOLERANCE,
    TP2,
    VPP2,
)
from tests.helpers.runs import Run, largest_difference, train

pytestmark = pytest.mark.distributed

# Without the per-token loss, --eod-mask-loss is refused with context parallelism.
RESET = ("--reset-position-ids", "--reset-attention-mask", *PER_TOKEN)
KD_KEYS = ("lm_loss", "kd_loss", "grad_norm")

# name -> (ranks, flags); the teacher's states of "pp4" are computed ahead, on all stages.
LAYOUTS: dict[str, tuple[int, tuple[str | int, ...]]] = {
    "tp2-cp2-sp": (4, (*TP2, *CP2, *SP)),
    "pp4": (4, ("--pipeline-model-parallel-size", 4, "--let-placement", "bubble")),
    "vpp2-recompute-full": (2, (*PP2, *VPP2, *FULL, "--recompute-num-layers", 1)),
    "tp2-sp": (2, (*TP2, *SP)),
    "cp2": (2, CP2),
    "pp2": (2, PP2),
    "tp2-pp2-sp": (4, (*TP2, *PP2, *SP)),
    "recompute-selective": (1, ("--recompute-granularity", "selective")),
}
SLOW = ("tp2-sp", "cp2", "pp2", "tp2-pp2-sp", "recompute-selective")


@pytest.fixture(scope="module")
def run(teacher: Path, documents: Path, weights: Path) -> Callable[..., Run]:
    def run(folder: Path, *flags: str | int, ranks: int = 1) -> Run:
        return train(
            folder, "--data-path", documents, "--load", weights, "--finetune", "--no-load-optim",
            "--no-load-rng", "--train-iters", 4, "--eval-interval", 4, "--let-weight", 0.5,
            "--let-stop-step", 10, *RESET, *flags, ranks=ranks, TEACHER=str(teacher),
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def one(run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("one"))


def assert_same(found: Run, expected: Run, keys: tuple[str, ...]) -> None:
    differences = {key: largest_difference(found, expected, key) for key in keys}
    losses = [
        [row["valid_loss"] for row in each.rows if "valid_loss" in row]
        for each in (found, expected)
    ]
    assert len(losses[0]) == 1 and losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in LAYOUTS]
)
def test_layout_matches_one_process(
    name: str, tmp_path: Path, run: Callable[..., Run], one: Run
) -> None:
    ranks, flags = LAYOUTS[name]
    assert_same(run(tmp_path, *flags, ranks=ranks), one, KEYS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2-cp2-sp", "vpp2-recompute-full"])
def test_distillation_matches_one_process(
    name: str, tmp_path: Path, run: Callable[..., Run]
) -> None:
    ranks, flags = LAYOUTS[name]
    found = run(tmp_path / "ranks", *RKD, *flags, ranks=ranks)
    assert_same(found, run(tmp_path / "one", *RKD), KD_KEYS)
