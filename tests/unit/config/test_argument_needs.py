"""An argument without the flag that it belongs to is refused or named."""

from __future__ import annotations

import argparse

import pytest

from megatron_let.config.argument_needs import check_needs, read_needs
from megatron_let.errors import LETError
from tests.unit.config.test_megatron_arguments import megatron_actions


def check(parser: argparse.ArgumentParser, flags: str) -> list[str]:
    """Return the sentences that are reported."""
    reported: list[str] = []
    check_needs(parser.parse_args(flags.split()), megatron_actions(parser), reported.append)
    return reported


def test_table_names_flags_and_arguments_of_megatron(parser: argparse.ArgumentParser) -> None:
    names = {action.dest for action in megatron_actions(parser)}
    for needs in read_needs().values():
        for flag, arguments in needs.items():
            for each in flag.split(" or "):
                assert each.split()[0] in parser._option_string_actions
            assert set(arguments) <= names


def test_defaults_are_accepted(parser: argparse.ArgumentParser) -> None:
    assert check(parser, "") == []


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ("--num-query-groups 2", "--group-query-attention"),
        ("--rope-scaling-factor 32", "--use-rope-scaling"),
        ("--kv-lora-rank 512", "--multi-latent-attention"),
        ("--yarn-beta-fast 16", "--position-embedding-type yarn"),
        ("--mscale 0.7", "--multi-latent-attention or --position-embedding-type yarn"),
        ("--moe-router-topk 4", "--num-experts"),
        ("--num-experts 4 --moe-shared-expert-gate", "--moe-shared-expert-intermediate-size"),
        ("--mtp-loss-scaling-factor 0.3", "--mtp-num-layers"),
    ],
)
def test_argument_that_leaves_the_model_unchanged_is_refused(
    parser: argparse.ArgumentParser, flags: str, missing: str
) -> None:
    given = [word for word in flags.split() if word.startswith("--")][-1]
    with pytest.raises(LETError, match=f"^{given}.*without {missing}.*drop {given}.$"):
        check(parser, flags)


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ("--recompute-num-layers 2", "--recompute-granularity full"),
        ("--recompute-granularity selective --recompute-num-layers 2", "full"),
        ("--recompute-granularity full --recompute-modules mlp", "selective"),
        ("--bf16 --initial-loss-scale 1024", "--fp16"),
        ("--lr-wsd-decay-iters 10", "--lr-decay-style WSD"),
        ("--wandb-exp-name trial", "--wandb-project"),
    ],
)
def test_argument_of_the_run_without_effect_is_named(
    parser: argparse.ArgumentParser, flags: str, missing: str
) -> None:
    (sentence,) = check(parser, flags)
    assert missing in sentence and sentence.split()[0] in flags


@pytest.mark.parametrize(
    "flags",
    [
        "--group-query-attention --num-query-groups 2",
        "--use-rope-scaling --rope-scaling-factor 32",
        "--recompute-granularity full --recompute-num-layers 2 --recompute-method block",
        "--lr-decay-style WSD --lr-wsd-decay-iters 10",
        "--fp16 --hysteresis 3",
    ],
)
def test_argument_with_its_flag_is_accepted(parser: argparse.ArgumentParser, flags: str) -> None:
    assert check(parser, flags) == []
