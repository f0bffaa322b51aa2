"""Every layout matches the losses, cosines and gradient norms of one process (fp32, 5 steps)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.models import save_teacher
from tests.helpers.runs import Run, largest_difference, train

TOLERANCE = 1e-5
KEYS = ("lm_loss", "let_cosine", "grad_norm")

PP2 = ("--pipeline-model-parallel-size", 2)
TP2 = ("--tensor-model-parallel-size", 2)
SP = ("--sequence-parallel",)
CP2 = ("--context-parallel-size", 2)
VPP2 = ("--num-layers-per-virtual-pipeline-stage", 1)
OVERLAP = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")
BLOCK = ("--recompute-granularity", "full", "--recompute-method", "block")
PER_TOKEN = ("--calculate-per-token-loss", "--eod-mask-loss")

# name -> (ranks, layer k, flags); the reference is one process with the same k.
LAYOUTS: dict[str, tuple[int, int, tuple[str | int, ...]]] = {
    "tp2": (2, 3, TP2),
    "tp2-sp": (2, 3, (*TP2, *SP)),
    "pp2-first-stage": (2, 1, PP2),
    "pp2-last-layer-of-stage": (2, 2, PP2),
    "pp2-last-stage": (2, 3, PP2),
    "pp2-last-layer-of-model": (2, 4, PP2),
    "vpp2": (2, 3, (*PP2, *VPP2)),
    "vpp2-last-layer-of-chunk": (2, 2, (*PP2, *VPP2)),
    "cp2": (2, 3, CP2),
    "tp2-cp2-sp": (4, 3, (*TP2, *CP2, *SP)),
    "dp2": (2, 3, ()),
    "tp2-pp2-sp": (4, 2, (*TP2, *PP2, *SP)),
    "dp2-distributed-optimizer": (2, 3, OVERLAP),
    "pp2-uneven": (2, 1, (*PP2, "--decoder-first-pipeline-num-layers", 1)),
    "recompute-full": (1, 3, (*FULL, "--recompute-num-layers", 1)),
    "recompute-full-2-layers": (1, 3, (*FULL, "--recompute-num-layers", 2)),
    "recompute-block": (1, 3, (*BLOCK, "--recompute-num-layers", 2)),
    "recompute-block-covers-k": (1, 2, (*BLOCK, "--recompute-num-layers", 2)),
    "recompute-selective": (1, 3, ("--recompute-granularity", "selective")),
    "pp2-recompute-full": (2, 1, (*PP2, *FULL, "--recompute-num-layers", 1)),
    "vpp2-recompute-full": (2, 3, (*PP2, *VPP2, *FULL, "--recompute-num-layers", 1)),
    "one-microbatch": (1, 3, ("--micro-batch-size", 8)),
    "eight-microbatches": (1, 3, ("--micro-batch-size", 1)),
}

# Another layer or number of layers in a layout that runs without -m slow.
SLOW = (
    "pp2-last-layer-of-model", "vpp2-last-layer-of-chunk", "pp2-uneven", "recompute-full-2-layers",
    "recompute-block-covers-k", "pp2-recompute-full", "eight-microbatches",
)  # fmt: skip

# Sharded parameters, from random weights: Megatron loads no other format into Megatron-FSDP.
MEGATRON_FSDP = (
    "--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params",
    "--ckpt-format", "fsdp_dtensor",
)  # fmt: skip
FSDP: dict[str, tuple[str | int, ...]] = {
    "torch": ("--use-torch-fsdp2",),
    "megatron": MEGATRON_FSDP,
}

# (loss, layout); CCA's collectives interleave with the schedule's, and recompute repeats them.
LOSSES = [
    ("logsum", "tp2-cp2-sp"),
    ("cca", "tp2-cp2-sp"),
    *(
        pytest.param(loss, name, marks=pytest.mark.slow)
        for loss in ("logsum", "cca")
        for name in ("tp2", "dp2", "tp2-sp", "cp2", "vpp2-recompute-full", "tp2-pp2-sp")
    ),
]


# (flags of a method that learns from the teacher's logits, layout).
RKD = ("--let-method", "rkd", "--let-kd-temperature", 2, "--let-kd-weight", 0.7)
SALT_TOP_K = ("--let-method", "salt", "--let-kd-top-k", 20)
# Four ranks share four samples; in the other layouts two ranks share two.
RKD_FOUR_SAMPLES = (*RKD, "--micro-batch-size", 4)
DISTILLED = [
    (RKD_FOUR_SAMPLES, "tp2-cp2-sp"),
    (RKD, "vpp2-recompute-full"),
    (SALT_TOP_K, "tp2-pp2-sp"),
    *(
        pytest.param(flags, name, marks=pytest.mark.slow)
        for flags in (RKD, SALT_TOP_K)
        for name in ("tp2", "dp2", "dp2-distributed-optimizer", "cp2", "vpp2", "pp2-last-stage")
    ),
]


@pytest.fixture(scope="module")
def narrow_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Width 16: with under eight tokens per feature, CCA's gradient multiplies rounding errors."""
    return save_teacher(tmp_path_factory.mktemp("teacher") / "narrow", width=16)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path, weights: Path):  # type: ignore[no-untyped-def]
    """Cached runs of one process, one per k and loss mode."""
    runs: dict[tuple[object, ...], Run] = {}

    def get(layer: int, *flags: object) -> Run:
        key = (layer, *flags)
        if key not in runs:
            folder = tmp_path_factory.mktemp("reference")
            runs[key] = _train(folder, teacher, data, weights, 1, layer, *flags)
        return runs[key]

    return get


def _train(
    folder: Path, teacher: Path, data: Path, weights: Path, ranks: int, layer: int, *flags: object
) -> Run:
    return train(
        folder, "--data-path", data, "--load", weights, "--finetune", "--no-load-optim",
        "--no-load-rng", "--train-iters", 5, "--eval-iters", 0, "--let-layer", layer,
        "--let-weight", 0.5, "--let-stop-step", 10, *flags,  # type: ignore[arg-type]
        ranks=ranks, TEACHER=str(teacher),
    )  # fmt: skip


def _assert_same(run: Run, reference: Run, keys: tuple[str, ...] = KEYS) -> None:
    differences = {key: largest_difference(run, reference, key) for key in keys}
    print(differences)
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYOUTS]
)
def test_layout_matches_one_process(
    name: str, tmp_path: Path, teacher: Path, data: Path, weights: Path, reference
) -> None:  # type: ignore[no-untyped-def]
    ranks, layer, flags = LAYOUTS[name]
    run = _train(tmp_path, teacher, data, weights, ranks, layer, *flags)
    _assert_same(run, reference(layer))


@pytest.mark.distributed
@pytest.mark.parametrize("sharded", FSDP)
def test_fsdp_on_two_ranks_matches_one_process(
    sharded: str, tmp_path: Path, teacher: Path, data: Path
) -> None:
    flags = ("--data-path", data, "--train-iters", 5, "--eval-iters", 0, "--let-weight", 2,
             "--let-stop-step", 4)  # fmt: skip
    one = train(tmp_path / "one", *flags, TEACHER=str(teacher))  # type: ignore[arg-type]
    run = train(tmp_path / "fsdp", *flags, *FSDP[sharded], ranks=2, TEACHER=str(teacher))  # type: ignore[arg-type]
    _assert_same(run, one)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["dp2", "tp2-cp2-sp", "pp2-last-stage"])
def test_per_token_loss_with_masked_tokens_matches_one_process(
    name: str, tmp_path: Path, teacher: Path, data: Path, weights: Path, reference
) -> None:  # type: ignore[no-untyped-def]
    ranks, layer, flags = LAYOUTS[name]
    mask = (*PER_TOKEN, "--null-tokenizer-eod-id", 249)
    run = _train(tmp_path, teacher, data, weights, ranks, layer, *flags, *mask)
    _assert_same(run, reference(layer, *mask))


@pytest.mark.distributed
@pytest.mark.parametrize(("loss", "name"), LOSSES)
def test_other_losses_match_one_process(
    loss: str, name: str, tmp_path: Path, narrow_teacher: Path, data: Path, weights: Path, reference
) -> None:  # type: ignore[no-untyped-def]
    ranks, layer, flags = LAYOUTS[name]
    of_loss = ("--let-loss", loss, "--let-teacher", narrow_teacher)
    run = _train(tmp_path, narrow_teacher, data, weights, ranks, layer, *flags, *of_loss)
    expected = reference(layer, *of_loss)
    _assert_same(run, expected, ("lm_loss", "grad_norm", f"let_{loss}"))
    # Near 0 if the loss is not the cosine, so compared with an absolute tolerance.
    cosines = [[row["let_cosine"] for row in r.steps] for r in (run, expected)]
    assert cosines[0] == pytest.approx(cosines[1], abs=TOLERANCE)


@pytest.mark.distributed
@pytest.mark.parametrize(("method", "name"), DISTILLED)
def test_distillation_matches_one_process(
    method: tuple[object, ...],
    name: str,
    tmp_path: Path,
    teacher: Path,
    data: Path,
    weights: Path,
    reference,
) -> None:  # type: ignore[no-untyped-def]
    ranks, layer, flags = LAYOUTS[name]
    run = _train(tmp_path, teacher, data, weights, ranks, layer, *flags, *method)
    _assert_same(run, reference(layer, *method), ("lm_loss", "kd_loss", "grad_norm"))
