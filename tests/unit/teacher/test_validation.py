"""A teacher must fit the student, its data and its vocabulary."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest

from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError
from megatron_let.teacher.inspect import TeacherFolder
from megatron_let.teacher.validation import check_fits, check_vocabulary_size

TEACHER = Path("/models/small")
FOLDER = TeacherFolder(TEACHER, num_layers=12, hidden_size=64, vocab_size=100, max_positions=2048)


def let_config(**values: Any) -> LETConfig:
    return LETConfig(**{"method": "let", "teacher": TEACHER, **values})


def megatron_args(**values: Any) -> argparse.Namespace:
    common: dict[str, Any] = {
        "num_layers": 24,
        "micro_batch_size": 16,
        "seq_length": 1280,
        "train_iters": 7629,
        "train_samples": None,
        "global_batch_size": 2048,
    }
    return argparse.Namespace(**common | values)


@pytest.mark.parametrize(
    ("config", "args", "named"),
    [
        ({"layer": 25}, {}, ["--let-layer is 25", "24 layers"]),
        ({"layer": 4}, {"hybrid_layer_pattern": "*-*-*-"}, ["--let-layer is 4", "3 layers"]),
        ({"teacher_layer": "13"}, {}, ["--let-teacher-layer is 13", "12 layers"]),
        (
            {"loss": "cca"},
            {"micro_batch_size": 2, "seq_length": 127},
            ["--let-loss cca", "64 features", "254 tokens", "--micro-batch-size to at least 3"],
        ),
        ({}, {"seq_length": 2049}, ["--seq-length is 2049", "2048 positions"]),
    ],
)
def test_size_that_does_not_fit_raises_error_naming_both_sizes(
    config: dict[str, Any], args: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(LETError) as error:
        check_fits(let_config(**config), FOLDER, megatron_args(**args))
    message = str(error.value)
    assert all(part in message for part in named), message
    assert "\n" not in message and message.endswith("."), message


def test_largest_sizes_that_fit_pass_without_warning() -> None:
    config = let_config(layer=24, teacher_layer="12", stop_step=7629)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fits(config, FOLDER, megatron_args(seq_length=2048))


def test_cca_with_four_tokens_per_feature_passes() -> None:
    check_fits(let_config(loss="cca"), FOLDER, megatron_args(micro_batch_size=2, seq_length=128))


def test_teacher_without_position_limit_takes_any_sequence() -> None:
    unlimited = dataclasses.replace(FOLDER, max_positions=None)
    check_fits(let_config(), unlimited, megatron_args(seq_length=10**6))


def test_own_tokenizer_lifts_the_position_limit_of_let_only() -> None:
    args = megatron_args(seq_length=2049)
    check_fits(let_config(cross_tokenizer=True), FOLDER, args)
    for method in ("rkd", "salt"):
        with pytest.raises(LETError, match="--seq-length is 2049"):
            check_fits(let_config(method=method, cross_tokenizer=True), FOLDER, args)


@pytest.mark.parametrize("steps", [100, 0])  # --train-iters 0 evaluates a checkpoint
def test_stop_step_beyond_the_run_warns(steps: int) -> None:
    with pytest.warns(UserWarning, match=f"--let-stop-step 101 .*{steps} steps"):
        check_fits(let_config(stop_step=101), FOLDER, megatron_args(train_iters=steps))


def test_vocabulary_larger_than_the_teachers_raises_error_naming_both() -> None:
    check_vocabulary_size(FOLDER, 100)
    with pytest.raises(LETError, match=r"101 .* 100"):
        check_vocabulary_size(FOLDER, 101)
