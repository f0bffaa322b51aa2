"""The entry on a GPU with NCCL and the Triton kernel, against the CPU and other precisions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.runs import largest_difference, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FLAGS = ("--finetune", "--no-load-optim", "--no-load-rng", "--train-iters", 5, "--eval-iters", 0,
         "--let-weight", 0.5, "--let-stop-step", 10)  # fmt: skip


def test_gpu_matches_cpu(tmp_path: Path, teacher: Path, data: Path, weights: Path) -> None:
    common = ("--data-path", data, "--load", weights, *FLAGS)
    gpu = train(tmp_path / "gpu", *common, TEACHER=str(teacher))
    cpu = train(tmp_path / "cpu", *common, TEACHER=str(teacher), CUDA_VISIBLE_DEVICES="")
    assert "backend NCCL" in gpu.log and "backend gloo" in cpu.log
    for key in ("lm_loss", "let_cosine", "grad_norm"):
        # fp32 matrix products may sum in another order.
        assert largest_difference(gpu, cpu, key) < 1e-3, key


@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
def test_half_precision_is_close_to_fp32(
    precision: str, tmp_path: Path, teacher: Path, data: Path, weights: Path
) -> None:
    common = ("--data-path", data, "--load", weights, *FLAGS)
    scale = ("--loss-scale", 4096) if precision == "--fp16" else ()
    half = train(tmp_path / "half", *common, precision, *scale, TEACHER=str(teacher))
    full = train(tmp_path / "full", *common, TEACHER=str(teacher))
    for key in ("lm_loss", "let_cosine", "grad_norm"):
        assert largest_difference(half, full, key) < 5e-2, key


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "layout",
    [("--tensor-model-parallel-size", 2, "--sequence-parallel"),
     ("--pipeline-model-parallel-size", 2), ("--context-parallel-size", 2)],
)  # fmt: skip
def test_layout_matches_one_gpu(
    layout: tuple[object, ...], tmp_path: Path, teacher: Path, data: Path, weights: Path
) -> None:
    common = ("--data-path", data, "--load", weights, *FLAGS)
    one = train(tmp_path / "one", *common, TEACHER=str(teacher))
    two = train(tmp_path / "two", *common, *layout, ranks=2, TEACHER=str(teacher))  # type: ignore[arg-type]
    for key in ("lm_loss", "let_cosine", "grad_norm"):
        assert largest_difference(two, one, key) < 1e-3, key
