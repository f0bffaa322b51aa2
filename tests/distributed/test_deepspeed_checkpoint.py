"""Checkpoints of DeepSpeed's engine: resumed on the same and on another number of replicas."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.deepspeed import BF16, SP, deepspeed_run, needs_deepspeed
from tests.helpers.runs import Run, environment

pytestmark = [pytest.mark.distributed, needs_deepspeed]

KEYS = ("lm_loss", "let_cosine", "grad_norm", "learning_rate")
SAVED_AT = 5


def _save(folder: Path, teacher: Path, data: Path, zero: dict[str, Any], *flags: object) -> Run:
    """Train ten steps with a checkpoint after the fifth, and make that the latest."""
    checkpoints = folder / "checkpoints"
    run = deepspeed_run(
        folder, teacher, data, zero, "--save", checkpoints, "--save-interval", SAVED_AT, *flags
    )
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(SAVED_AT))
    return run


def _differences(resumed: Run, whole: Run) -> dict[str, float]:
    """Return the largest relative difference of each metric after the checkpoint."""
    pairs = list(zip(resumed.steps, whole.steps[SAVED_AT:], strict=True))
    return {
        key: max(abs(a[key] - b[key]) / abs(b[key]) for a, b in pairs if key in b) for key in KEYS
    }


def _convert(folder: Path) -> None:
    """Run DeepSpeed's converter, as the error says."""
    source = folder / "checkpoints" / f"iter_{SAVED_AT:07d}"
    target = source.with_name(source.name + "_universal")
    result = subprocess.run(
        [
            sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder",
            str(source), "--output_folder", str(target), "--num_extract_workers", "1",
            "--num_merge_workers", "1",
        ],
        env=environment(DS_ACCELERATOR="cpu"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def test_resumed_run_has_the_same_losses(tmp_path: Path, teacher: Path, data: Path) -> None:
    zero, checkpoints = {"stage": 1}, tmp_path / "whole" / "checkpoints"
    whole = _save(tmp_path / "whole", teacher, data, zero)
    same = deepspeed_run(tmp_path / "same", teacher, data, zero, "--load", checkpoints)
    assert _differences(same, whole) == dict.fromkeys(KEYS, 0.0)
    info = json.loads((checkpoints / "iter_0000005" / "deepspeed.json").read_text())
    assert info == {
        "iteration": 5, "zero_stage": 1, "data_parallel_size": 2, "tensor_parallel_size": 1,
    }  # fmt: skip
    assert not (checkpoints / "partial").exists()


def test_rate_changes_on_resume_if_it_is_overridden(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    zero, flags = {"stage": 1}, ("--lr-decay-style", "constant", "--lr-warmup-iters", 0)
    _save(tmp_path / "whole", teacher, data, zero, *flags, "--lr", 1e-3)
    resumed = deepspeed_run(
        tmp_path / "other", teacher, data, zero, "--load", tmp_path / "whole" / "checkpoints",
        *flags, "--lr", 7e-3, "--override-opt_param-scheduler",
    )  # fmt: skip
    assert {row["learning_rate"] for row in resumed.steps} == {7e-3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "flags"),
    [
        ({"stage": 0}, ()),
        ({"stage": 2}, SP),
        ({"stage": 3}, ()),
        ({"stage": 3}, ("--bf16",)),
        ({"stage": 1}, ("--bf16",)),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, ()),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, ()),
    ],
    ids=[
        "zero0",
        "zero2-tp2-sp",
        "zero3",
        "zero3-bf16",
        "zero1-bf16",
        "zero3-offload",
        "zero2-offload",
    ],
)
def test_same_layout_resumes_bitwise(
    zero: dict[str, Any], flags: tuple[object, ...], tmp_path: Path, teacher: Path, data: Path
) -> None:
    whole = _save(tmp_path / "whole", teacher, data, zero, *flags)
    load = ("--load", tmp_path / "whole" / "checkpoints")
    same = deepspeed_run(tmp_path / "same", teacher, data, zero, *load, *flags)
    assert _differences(same, whole) == dict.fromkeys(KEYS, 0.0)


@pytest.mark.slow
def test_another_model_is_refused_before_training(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    zero, load = {"stage": 3}, ("--load", tmp_path / "whole" / "checkpoints")
    _save(tmp_path / "whole", teacher, data, zero)
    run = deepspeed_run(
        tmp_path / "other", teacher, data, zero, *load, "--rotary-base", 20000, check=False
    )
    assert run.returncode != 0
    assert "--rotary-base is 20000.0 in this run and 10000.0 in the checkpoint" in run.error


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_checkpoint_resumes_after_conversion(
    stage: int, tmp_path: Path, teacher: Path, data: Path
) -> None:
    zero, load = {"stage": stage}, ("--load", tmp_path / "whole" / "checkpoints")
    whole = _save(tmp_path / "whole", teacher, data, zero, *BF16)
    _convert(tmp_path / "whole")
    other = deepspeed_run(tmp_path / "other", teacher, data, zero, *load, *BF16, ranks=1)
    differences = _differences(other, whole)
    print(differences)
    # The spread of bf16 between two orders of summation, as in test_deepspeed.py.
    assert differences["lm_loss"] < 5e-5 and differences["grad_norm"] < 1e-3, differences


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_other_number_of_replicas_resumes_after_conversion(
    stage: int, tmp_path: Path, teacher: Path, data: Path
) -> None:
    zero, load = {"stage": stage}, ("--load", tmp_path / "whole" / "checkpoints")
    whole = _save(tmp_path / "whole", teacher, data, zero)
    refused = deepspeed_run(tmp_path / "refused", teacher, data, zero, *load, ranks=1, check=False)
    assert refused.returncode != 0 and "ds_to_universal" in refused.error
    _convert(tmp_path / "whole")
    other = deepspeed_run(tmp_path / "other", teacher, data, zero, *load, ranks=1)
    differences = _differences(other, whole)
    print(differences)
    assert max(differences.values()) < 1e-5, differences
