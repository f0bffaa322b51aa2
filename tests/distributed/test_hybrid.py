"""Megatron's HybridModel: the numbers of the GPTModel with the same weights, in every layout.

The reference has no hybrid code: a GPTModel, whose checkpoint Megatron loads into the entries.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_let.checkpoint.weights import open_weights
from megatron_let.errors import LETError
from tests.distributed.test_training import COMMON, USER_SCRIPT
from tests.helpers.runs import Run, largest_difference, run_forked, train
from tests.helpers.tensorboard import scalars

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
PATTERN = ("--hybrid-layer-pattern", "*-*-*-*-")
PP2 = ("--pipeline-model-parallel-size", 2)
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")
METHODS: dict[str, tuple[object, ...]] = {
    "let": ("--let-layer", 2, "--let-weight", 0.5),
    "rkd": ("--let-method", "rkd"),
}
KEYS = {"let": ("lm_loss", "let_cosine", "grad_norm"), "rkd": ("lm_loss", "kd_loss", "grad_norm")}

# (method, ranks, flags); layer 2 is entries 3 and 4.
LAYOUTS: dict[str, tuple[str, int, tuple[object, ...]]] = {
    "tp2-sp": ("let", 2, ("--tensor-model-parallel-size", 2, "--sequence-parallel", *PATTERN)),
    "pp2": ("let", 2, (*PP2, *PATTERN)),
    "pp2-layer-on-two-stages": ("let", 2, (*PP2, "--hybrid-layer-pattern", "*-*|-*-*-")),
    "vpp2": ("let", 2, (*PP2, "--hybrid-layer-pattern", "*|-*-|*-|*-")),
    "dp2": ("let", 2, PATTERN),
    "cp2": ("let", 2, ("--context-parallel-size", 2, *PATTERN)),
    "recompute-full": ("let", 1, (*FULL, "--recompute-num-layers", 3, *PATTERN)),
    "rkd-pp2": ("rkd", 2, (*PP2, "--hybrid-layer-pattern", "*-*|-*-*-")),
}
SLOW = ("cp2", "dp2", "rkd-pp2", "vpp2")


@pytest.fixture(scope="module")
def gpt(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path, weights: Path
) -> dict[str, Run]:
    """Runs of a GPTModel in one process, by method."""
    return {
        method: _train(tmp_path_factory.mktemp(method), teacher, data, weights, method)
        for method in METHODS
    }


def _train(
    folder: Path,
    teacher: Path,
    data: Path,
    weights: Path,
    method: str,
    *flags: object,
    ranks: int = 1,
) -> Run:
    return train(
        folder, "--data-path", data, "--load", weights, "--finetune", "--no-load-optim",
        "--no-load-rng", "--train-iters", 4, "--eval-iters", 0, "--let-stop-step", 10,
        *METHODS[method], *flags,  # type: ignore[arg-type]
        ranks=ranks, TEACHER=str(teacher),
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_hybrid_model_is_bitwise_equal_to_the_gpt_model(
    method: str, tmp_path: Path, teacher: Path, data: Path, weights: Path, gpt: dict[str, Run]
) -> None:
    run = _train(tmp_path, teacher, data, weights, method, *PATTERN)
    assert ("layer 2 of 4 is entries 3 to 4 (*-)" in run.log) == (method == "let")
    for key in KEYS[method]:
        assert largest_difference(run, gpt[method], key) == 0.0, key


def test_experts_are_bitwise_equal_to_those_of_the_gpt_model(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    experts = (
        "--num-experts", 4, "--moe-router-topk", 2, "--moe-ffn-hidden-size", 64,
        "--moe-aux-loss-coeff", 0.01,
    )  # fmt: skip
    weights = tmp_path / "weights"
    train(
        tmp_path / "first", "--data-path", data, "--save", weights, "--train-iters", 1,
        "--lr-warmup-iters", 0, "--eval-iters", 0, "--let-method", "none", *experts,
        TEACHER=str(teacher),
    )  # fmt: skip
    runs = [
        _train(tmp_path / name, teacher, data, weights, "let", *experts, *pattern)
        for name, pattern in (("gpt", ()), ("hybrid", ("--hybrid-layer-pattern", "*E*E*E*E")))
    ]
    for key in KEYS["let"]:
        assert largest_difference(runs[1], runs[0], key) == 0.0, key


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS],
)
def test_layout_matches_one_process(
    name: str, tmp_path: Path, teacher: Path, data: Path, weights: Path, gpt: dict[str, Run]
) -> None:
    method, ranks, flags = LAYOUTS[name]
    run = _train(tmp_path, teacher, data, weights, method, *flags, ranks=ranks)
    differences = {key: largest_difference(run, gpt[method], key) for key in KEYS[method]}
    assert max(differences.values()) < TOLERANCE, differences


# Layer 2 is entry 3, a Mamba entry without an MLP.
MAMBA = ("--mamba-state-dim", 8, "--mamba-head-dim", 16, "--mamba-num-groups", 2)
MAMBA_LAYOUTS: dict[str, tuple[int, tuple[object, ...]]] = {
    "tp2-sp": (2, ("--tensor-model-parallel-size", 2, "--sequence-parallel")),
    "pp2-recompute-full": (
        2,
        (*PP2, *FULL, "--recompute-num-layers", 1, "--hybrid-layer-pattern", "M-M|*-M"),
    ),
}


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> tuple[Path, Run]:
    """Checkpoint of a model with Mamba entries, and a run of one process from it."""
    folder = tmp_path_factory.mktemp("mamba")
    checkpoint = folder / "checkpoint"
    train(
        folder / "before", "--data-path", data, "--train-iters", 3, "--lr", 1e-2, "--save",
        checkpoint, "--eval-iters", 0, "--hybrid-layer-pattern", "M-M*-M", *MAMBA,
        module="tests.helpers.mamba", TEACHER=str(teacher),
    )  # fmt: skip
    return checkpoint, _mamba(folder / "reference", teacher, data, checkpoint)


def _mamba(
    folder: Path, teacher: Path, data: Path, weights: Path, *flags: object, ranks: int = 1
) -> Run:
    return train(
        folder, "--data-path", data, "--load", weights, "--finetune", "--no-load-optim",
        "--no-load-rng", "--train-iters", 3, "--eval-iters", 0, *METHODS["let"],
        "--hybrid-layer-pattern", "M-M*-M", *MAMBA, *flags,  # type: ignore[arg-type]
        ranks=ranks, module="tests.helpers.mamba", TEACHER=str(teacher),
    )  # fmt: skip


@pytest.mark.parametrize("name", MAMBA_LAYOUTS)
def test_layout_of_mamba_entries_matches_one_process(
    name: str, tmp_path: Path, teacher: Path, data: Path, mamba: tuple[Path, Run]
) -> None:
    weights, reference = mamba
    ranks, flags = MAMBA_LAYOUTS[name]
    run = _mamba(tmp_path, teacher, data, weights, *flags, ranks=ranks)
    assert "layer 2 of 4 is entry 3 (M)" in run.log
    differences = {key: largest_difference(run, reference, key) for key in KEYS["let"]}
    assert max(differences.values()) < TOLERANCE, differences


def test_resumed_run_has_the_same_losses_and_its_checkpoint_is_not_taken_for_a_gpt_model(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    """With a learned projection, whose tensors are in the checkpoint, and the model from there."""
    checkpoints = tmp_path / "checkpoints"
    common = ("--data-path", data, "--let-projection", "learned", "--let-layer", "middle",
              "--eval-iters", 0, "--train-iters", 4)  # fmt: skip
    whole = train(
        tmp_path / "whole", *common, "--save", checkpoints, "--save-interval", 2, *PATTERN,
        TEACHER=str(teacher),
    )  # fmt: skip
    resumed = train(
        tmp_path / "resumed", *common, "--load", checkpoints, "--ckpt-step", 2,
        "--use-checkpoint-args", TEACHER=str(teacher),
    )  # fmt: skip
    steps = {row["iteration"]: row for row in whole.steps}
    assert [row["iteration"] for row in resumed.steps] == [3, 4]
    for row in resumed.steps:
        for key in KEYS["let"]:
            assert row[key] == steps[row["iteration"]][key], key
    with pytest.raises(LETError, match="hybrid_layer_pattern"):
        open_weights(checkpoints)


def _user_script(folder: Path, *flags: object, **variables: str) -> None:
    """Run the user's script, with stock Megatron's HybridModel, as a fork."""
    folder.mkdir(exist_ok=True)
    argv = (USER_SCRIPT, *COMMON, *PATTERN, *flags)
    variables["LOCAL_SPEC"] = "1"
    code, log = run_forked("tests.helpers.on_cpu", *argv, folder=folder, **variables)
    assert code == 0, log[-4000:]


def test_run_without_let_is_bitwise_equal_to_stock(tmp_path: Path, data: Path) -> None:
    folders = (tmp_path / "ours", tmp_path / "stock")
    ours, stock = (("--data-path", data, "--tensorboard-dir", f / "tensorboard") for f in folders)
    train(folders[0], *COMMON, *PATTERN, *ours, "--let-method", "none", config=None)
    _user_script(folders[1], *stock, LET="0")
    for name in ("lm loss", "grad-norm"):
        values = [scalars(folder / "tensorboard", name) for folder in folders]
        assert values[0] and values[0] == values[1], name


def test_user_script_with_three_lines_matches_entry(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    let = ("--data-path", data, "--let-method", "let", "--let-teacher", teacher, "--let-layer", 2,
           "--let-teacher-dtype", "fp32", "--let-stop-step", 6)  # fmt: skip
    ours = train(tmp_path / "ours", *COMMON, *PATTERN, *let, config=None)
    metrics = tmp_path / "theirs.jsonl"
    _user_script(tmp_path / "theirs", *let, "--let-metrics-path", metrics, LET="1")
    for key in KEYS["let"]:
        assert largest_difference(ours, Run(0, "", metrics), key) == 0.0, key
