"""Validation of Megatron's arguments for the DeepSpeed engine."""

from __future__ import annotations

import argparse

import pytest

from megatron_let.config.validation import check_teacher_shard
from megatron_let.engines.deepspeed.validation import (
    UNSUPPORTED,
    check_arguments,
    disable_replaced_switches,
)
from megatron_let.errors import LETError


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_value_is_refused_with_its_flag(name: str) -> None:
    supported, _ = UNSUPPORTED[name]
    for value in supported:
        check_arguments(argparse.Namespace(**{name: value}))
    with pytest.raises(LETError, match=r"cannot be used with --[a-z0-9-]+ other: ."):
        check_arguments(argparse.Namespace(**{name: "other"}))


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("pipeline_model_parallel_size", "--pipeline-model-parallel-size 2"),
        ("virtual_pipeline_model_parallel_size", "--num-layers-per-virtual-pipeline-stage 2"),
        ("context_parallel_size", "--context-parallel-size 2"),
        ("expert_model_parallel_size", "--expert-model-parallel-size 2"),
        ("rampup_batch_size", "--rampup-batch-size 2"),
    ],
)
def test_unsupported_layout_error_names_the_flag_and_the_other_engine(name: str, flag: str) -> None:
    with pytest.raises(LETError, match=f"{flag}: .*--engine megatron"):
        check_arguments(argparse.Namespace(**{name: 2}))


def test_replaced_switches_are_off_and_reported_in_one_line() -> None:
    args = argparse.Namespace(
        use_distributed_optimizer=False,
        overlap_grad_reduce=False,
        overlap_param_gather=True,
        async_save=True,
        use_persistent_ckpt_worker=False,
    )
    lines: list[str] = []
    disable_replaced_switches(args, lines.append)
    assert not args.overlap_param_gather and not args.async_save
    assert len(lines) == 1 and "--overlap-param-gather" in lines[0] and "--async-save" in lines[0]


@pytest.mark.parametrize(
    ("engine", "method", "message"),
    [
        ("megatron", "let", "cannot be used with --engine megatron"),
        ("deepspeed", "rkd", "cannot be used with --let-method rkd"),
        ("deepspeed", "salt", "cannot be used with --let-method salt"),
    ],
)
def test_teacher_shard_needs_deepspeed_and_let(engine: str, method: str, message: str) -> None:
    check_teacher_shard(
        argparse.Namespace(engine=engine, let_method=method, let_teacher_shard=False)
    )
    with pytest.raises(LETError, match=message):
        check_teacher_shard(
            argparse.Namespace(engine=engine, let_method=method, let_teacher_shard=True)
        )
