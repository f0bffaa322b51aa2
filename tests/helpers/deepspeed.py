"""Runs on DeepSpeed's engine, skipped if it is not installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import Run, train

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: bash launch/lib/environment.sh deepspeed",
)

# Weight decay and alignment large enough to change the sixth digit if they were lost.
COMMON = (
    "--eval-iters", 0, "--weight-decay", 10, "--let-weight", 5, "--let-stop-step", 8,
)  # fmt: skip
TP2 = ("--tensor-model-parallel-size", 2)
SP = (*TP2, "--sequence-parallel")
BF16 = ("--bf16",)


def megatron_run(
    folder: Path, teacher: Path, data: Path, *flags: object, ranks: int = 1, **options: Any
) -> Run:
    """Run the tiny recipe for 10 steps on Megatron's engine."""
    options |= {"TEACHER": str(teacher)}
    return train(folder, "--data-path", data, *COMMON, *flags, ranks=ranks, **options)  # type: ignore[arg-type]


def deepspeed_run(
    folder: Path,
    teacher: Path,
    data: Path,
    zero: dict[str, Any],
    *flags: object,
    ranks: int = 2,
    **options: Any,
) -> Run:
    """Run the same on DeepSpeed's engine, with this `zero_optimization`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "deepspeed.json"
    config.write_text(json.dumps({"zero_optimization": zero}))
    engine = ("--engine", "deepspeed", "--deepspeed-config", config)
    return megatron_run(folder, teacher, data, *engine, *flags, ranks=ranks, **options)
