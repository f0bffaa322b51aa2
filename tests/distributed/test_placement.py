"""Every placement of the teacher matches one process (fp32)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.distributed.test_layout_matrix import BLOCK, CP2, FULL, LAYOUTS, PP2, SP, TP2, VPP2
from tests.distributed.test_layout_matrix import PER_TOKEN as PER_TOKEN_FLAGS
from tests.helpers.runs import ROOT, Run, largest_difference, train

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
KEYS = ("lm_loss", "let_cosine", "grad_norm")
# Measured costs would give different plans on different machines.
FIXED = "tests.helpers.fixed_costs"

PER_TOKEN = (*PER_TOKEN_FLAGS, "--null-tokenizer-eod-id", 249)
ONE_SAMPLE = ("--micro-batch-size", 1)
PP4 = ("--pipeline-model-parallel-size", 4)
Flags = tuple[str | int, ...]

# name -> (ranks, layer k, flags, flags of the reference)
LAYOUTS_OF_PIPELINES: dict[str, tuple[int, int, Flags, Flags]] = {
    **{name: (*layout, ()) for name, layout in LAYOUTS.items()},
    "pp4": (4, 1, PP4, ()),
    "pp4-third-stage": (4, 3, PP4, ()),
    "cp2-pp2": (4, 1, (*CP2, *PP2), ()),
    "dp2-pp2-per-token": (4, 3, (*PP2, *PER_TOKEN), PER_TOKEN),
    "tp2-pp2-sp-split": (4, 1, (*TP2, *PP2, *SP), ()),
    "tp2-pp2-sp-full": (4, 1, (*TP2, *PP2, *SP, *FULL, "--recompute-num-layers", 1), ()),
    # Two ranks for one sample: they run two microbatches at a time.
    "tp2-pp2-sp-one-sample": (4, 1, (*TP2, *PP2, *SP, *ONE_SAMPLE), ONE_SAMPLE),
    "pp2-block": (2, 1, (*PP2, *BLOCK, "--recompute-num-layers", 1), ()),
    "pp2-odd-microbatches": (2, 1, (*PP2, "--global-batch-size", 10), ("--global-batch-size", 10)),
    "vpp2-eight": (2, 3, (*PP2, *VPP2, "--micro-batch-size", 1), ("--micro-batch-size", 1)),
    "vpp2-full-first": (2, 1, (*PP2, *VPP2, *FULL, "--recompute-num-layers", 1), ()),
}  # fmt: skip
IN_THE_DEFAULT_SUITE = [
    ("aligned-stage", "cp2-pp2"),
    ("bubble", "pp2-first-stage"),
    ("bubble", "tp2-pp2-sp-one-sample"),
    ("bubble", "tp2-pp2-sp-split"),
    ("bubble", "vpp2-full-first"),
    ("spread", "dp2-pp2-per-token"),
]
ALL = [(p, n) for p in ("aligned-stage", "spread", "bubble", "auto") for n in LAYOUTS_OF_PIPELINES]


def _run(
    folder: Path,
    teacher: Path,
    data: Path,
    weights: Path,
    *flags: str | int | Path,
    ranks: int = 1,
    config: str = "configs/tiny.yaml",
) -> Run:
    return train(
        folder, "--data-path", data, "--load", weights, "--finetune", "--no-load-optim",
        "--no-load-rng", "--train-iters", 5, "--eval-iters", 0, "--let-weight", 0.5,
        "--let-stop-step", 10, *flags,
        ranks=ranks, config=config, module=FIXED, TEACHER=str(teacher),
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path, weights: Path):  # type: ignore[no-untyped-def]
    """Cached runs of one process, one per k and set of flags."""
    runs: dict[tuple[object, ...], Run] = {}

    def get(layer: int, *flags: str | int) -> Run:
        key = (layer, *flags)
        if key not in runs:
            folder = tmp_path_factory.mktemp("reference")
            runs[key] = _run(folder, teacher, data, weights, "--let-layer", layer, *flags)
        return runs[key]

    return get


def _assert_same(run: Run, reference: Run) -> None:
    differences = {key: largest_difference(run, reference, key) for key in KEYS}
    print(differences)
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize(
    ("placement", "name"),
    [
        pytest.param(*case, marks=() if case in IN_THE_DEFAULT_SUITE else pytest.mark.slow)
        for case in sorted(ALL)
    ],
)
def test_placement_matches_one_process(
    placement: str, name: str, tmp_path: Path, teacher: Path, data: Path, weights: Path, reference
) -> None:  # type: ignore[no-untyped-def]
    ranks, layer, flags, common = LAYOUTS_OF_PIPELINES[name]
    run = _run(
        tmp_path, teacher, data, weights, "--let-layer", layer, *flags,
        "--let-placement", placement, ranks=ranks,
    )  # fmt: skip
    _assert_same(run, reference(layer, *common))


# Replayed steps, evaluation in between, a skipped iteration, a growing batch, and S_stop.
EVENTFUL = (
    "--train-iters", 7, "--let-stop-step", 6, "--iterations-to-skip", 4,
    "--eval-interval", 2, "--eval-iters", 1, "--step-batch-size-schedule", "0:4 512:8",
)  # fmt: skip


def test_replays_skips_and_batch_ramp_match_one_process(
    tmp_path: Path, teacher: Path, data: Path, weights: Path
) -> None:
    # The batch-size schedule does not allow a fixed size.
    recipe = tmp_path / "growing.yaml"
    tiny = (ROOT / "configs" / "tiny.yaml").read_text()
    recipe.write_text(tiny.replace("  global-batch-size: 8\n", ""))
    common = (teacher, data, weights, "--let-layer", 1, "--micro-batch-size", 1)
    expected = _run(tmp_path / "one", *common, *EVENTFUL, config=str(recipe))
    run = _run(
        tmp_path / "two", *common, *EVENTFUL, *PP2,
        "--let-placement", "bubble", "--rerun-mode", "report_stats",
        ranks=2, config=str(recipe),
    )  # fmt: skip
    assert "the teacher is freed" in run.log
    assert [row["iteration"] for row in run.steps] == [1, 2, 3, 5, 6, 7]
    _assert_same(run, expected)
    for ours, theirs in zip(_evaluations(run), _evaluations(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE)


def _evaluations(run: Run) -> list[float]:
    losses = [row["valid_loss"] for row in run.rows if "valid_loss" in row]
    assert losses
    return losses


def test_placements_and_resumed_run_are_bitwise_equal(
    tmp_path: Path, teacher: Path, data: Path, weights: Path
) -> None:
    """After the resume the tokens ahead are read again: the data continues where stock's would."""

    def run(name: str, *flags: str | int | Path) -> Run:
        return train(
            tmp_path / name, "--data-path", data, *PP2, "--micro-batch-size", 1, "--let-layer", 1,
            "--let-weight", 0.5, "--let-stop-step", 20, *flags, ranks=2, module=FIXED,
            TEACHER=str(teacher),
        )  # fmt: skip

    saved = tmp_path / "saved"
    spread = run("spread", "--let-placement", "spread", "--let-max-prefetch", 2)
    checkpoint = ("--save", saved, "--load", saved, "--save-interval", 5)
    bubble = run("bubble", "--let-placement", "bubble", *checkpoint)
    assert re.search(r"[1-9] of 8 microbatches one batch ahead", bubble.log)
    shutil.rmtree(saved / "iter_0000010")
    (saved / "latest_checkpointed_iteration.txt").write_text("5")
    resumed = run("resumed", "--let-placement", "bubble", *checkpoint)
    assert [row["iteration"] for row in resumed.steps] == [6, 7, 8, 9, 10]
    for key in KEYS:
        assert [row[key] for row in spread.steps] == [row[key] for row in bubble.steps]
        assert [row[key] for row in resumed.steps] == [row[key] for row in bubble.steps[5:]]


@pytest.mark.parametrize(
    ("stages", "limit"), [pytest.param(2, 4, marks=pytest.mark.slow), (3, 16), (4, 4)]
)
def test_bubble_completes_under_nccl_rules(
    stages: int, limit: int, tmp_path: Path, teacher: Path, data: Path
) -> None:
    """Sends need a posted receive, and the schedule's communication waits for all messages."""
    run = train(
        tmp_path, "--data-path", data, "--num-layers", stages, "--let-layer", 1,
        "--pipeline-model-parallel-size", stages, "--micro-batch-size", 1,
        "--global-batch-size", 16, "--train-iters", 4, "--let-placement", "bubble",
        "--let-max-prefetch", limit, ranks=stages, module="tests.helpers.nccl_rules",
        TEACHER=str(teacher),
    )  # fmt: skip
    assert [row["iteration"] for row in run.steps] == [1, 2, 3, 4]


@pytest.mark.parametrize(("placement", "waits"), [("bubble", "False"), ("aligned-stage", "True")])
def test_communication_waits_for_the_device_only_without_states(
    placement: str, waits: str, tmp_path: Path, teacher: Path, data: Path
) -> None:
    run = train(
        tmp_path, "--data-path", data, *PP2, "--train-iters", 3, "--eval-iters", 0,
        "--let-layer", 1, "--let-stop-step", 2, "--let-placement", placement, ranks=2,
        module="tests.helpers.device_waits", TEACHER=str(teacher),
    )  # fmt: skip
    found = set(re.findall(r"step (\d+) waits (\w+)", run.log))
    assert found == {("0", waits), ("1", waits), ("2", "True")}
