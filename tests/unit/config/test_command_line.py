"""The command line of the entry, up to Megatron's own validation."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from megatron.training import arguments

from megatron_let.config.command_line import parse_command_line
from megatron_let.errors import LETError
from megatron_let.pretrain import prepare_arguments, report_once
from tests.helpers.runs import ROOT

# Megatron's parser passes `type` to a boolean flag.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")

TINY = ["--config", str(ROOT / "configs/tiny.yaml"), "--let-teacher", "/t"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--cuda-graph-impl local", "--cuda-graph-impl local"),
        # Megatron's validation would raise about --te-rng-tracker.
        ("--cuda-graph-impl full_iteration", "--cuda-graph-impl full_iteration"),
        ("--overlap-moe-expert-parallel-comm", "drop --overlap-moe-expert-parallel-comm"),
        ("--moe-expert-rank-capacity-factor 1.0", "--moe-expert-rank-capacity-factor 1.0"),
        ("--hybrid-layer-pattern *-*-*-*- --use-rope-scaling", "drop --use-rope-scaling"),
        ("--hybrid-layer-pattern *-X", "'X' is not a valid layer symbol"),
        ("--hybrid-layer-pattern *-*- --engine deepspeed", "--engine deepspeed"),
        ("--use-torch-fsdp2 --context-parallel-size 2", "--context-parallel-size 2"),
        ("--sft", "--sft"),
        # The layers of a host with Transformer Engine.
        ("--reset-attention-mask", "--transformer-impl local"),
        ("--let-method none --reset-attention-mask", "--transformer-impl local"),
        ("--dataloader-inter-document-masking", "--dataloader-inter-document-masking"),
        ("--hybrid-context-parallel", "--hybrid-context-parallel"),
        ("--perform-rl-step", "--perform-rl-step"),
        ("--let-method rkd --cuda-graph-impl local", "--let-method rkd"),
        ("--let-projection learned --ckpt-format torch", "--ckpt-format torch"),
        ("--let-projection learned --engine deepspeed", "--engine deepspeed"),
        ("--let-method none --fim-data", "--fim-data"),
        ("--rampup-batch-size 2 2 32", "--step-batch-size-schedule"),
        ("--num-query-groups 2", "--group-query-attention"),
        ("--train-samples 80", "--train-iters 10 and --train-samples 80"),
        ("--train-iters 2 --lr-warmup-iters 2", "--lr-warmup-iters 2"),
        ("--load /nowhere", "--load /nowhere"),
        ("--let-method none --yaml-cfg some.yaml", "--yaml-cfg"),
    ],
)
def test_unsupported_flag_raises_error_naming_it_before_megatrons_validation(
    flags: str, named: str
) -> None:
    with pytest.raises(LETError) as error:
        parse_command_line([*TINY, *flags.split()], [], prepare_arguments)
    assert named in str(error.value)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.fixture
def no_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's parser without its validation and its global state."""
    monkeypatch.setattr(arguments, "parse_and_validate_args", arguments.parse_args)


def test_command_line_overrides_recipe_and_recipe_overrides_host(no_validation: None) -> None:
    host_flags = ["--num-layers", "9", "--seq-length", "9", "--no-rope-fusion"]
    checked: list[argparse.Namespace] = []
    args = parse_command_line([*TINY, "--num-layers", "6"], host_flags, checked.append)
    assert (args.num_layers, args.seq_length, args.apply_rope_fusion) == (6, 64, False)
    assert checked == [args], "the flags are parsed once"


def test_flag_without_effect_is_reported(no_validation: None) -> None:
    said: list[str] = []
    parse_command_line(
        [*TINY, "--recompute-num-layers", "2"], [], lambda args: None, True, said.append
    )
    assert len(said) == 1 and "--recompute-num-layers 2" in said[0]


def test_checkpoint_may_bring_the_flag_that_another_needs(no_validation: None) -> None:
    flags = ["--moe-aux-loss-coeff", "0.1"]
    with pytest.raises(LETError, match="--num-experts"):
        parse_command_line([*TINY, *flags], [], lambda args: None)
    parse_command_line([*TINY, *flags, "--use-checkpoint-args"], [], lambda args: None)


def test_model_that_a_checkpoint_brings_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags are in order; Megatron then takes the model from the checkpoint."""

    def load_model(**provider: Any) -> argparse.Namespace:
        args: argparse.Namespace = arguments.parse_args(**provider)
        args.num_attention_heads, args.num_query_groups = 4, 3
        args.group_query_attention = True
        return args

    monkeypatch.setattr(arguments, "parse_and_validate_args", load_model)
    with pytest.raises(LETError, match="--num-query-groups 3"):
        parse_command_line([*TINY, "--use-checkpoint-args"], [], lambda args: None)


@pytest.mark.parametrize(("rank", "printed"), [(None, True), ("0", True), ("1", False)])
def test_sentences_about_the_flags_are_printed_on_one_rank(
    rank: str | None,
    printed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    report_once("a flag has no effect")
    assert capsys.readouterr().out == "megatron_let: a flag has no effect\n" * printed


def test_command_line_without_recipe_is_parsed_alone(no_validation: None) -> None:
    args = parse_command_line(["--num-layers", "6"], [], lambda args: None)
    assert (args.num_layers, args.hidden_size, args.let_method) == (6, None, None)


def test_help_lists_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_command_line(["--help"], [], prepare_arguments)
    assert end.value.code == 0
    assert "--let-method {none,let,rkd,salt}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--let-wieght 1", "--let-wieght 1; did you mean --let-weight?"),
        ("--num-layer 4", "--num-layer 4; did you mean --num-layers?"),
        ("--xyzzy", "--xyzzy; see --help."),
        ("--num-layers four", "--num-layers: invalid int value: 'four'"),
        ("--let-method lett", "--let-method: invalid choice: 'lett'"),
        ("--num-layers", "--num-layers: expected one argument"),
    ],
)
def test_flag_that_cannot_be_parsed_is_one_sentence(flags: str, named: str) -> None:
    with pytest.raises(LETError) as error:
        parse_command_line(flags.split(), [], prepare_arguments)
    assert named in str(error.value) and "\n" not in str(error.value)
