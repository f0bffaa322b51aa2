"""Length, schedule and evaluation of a run, completed or refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from megatron_let.config.run_settings import complete_run_settings
from megatron_let.errors import LETError


def complete(parser: argparse.ArgumentParser, *flags: str) -> tuple[argparse.Namespace, list[str]]:
    """Return the completed arguments and what was reported."""
    reported: list[str] = []
    args = parser.parse_args(list(flags))
    complete_run_settings(args, reported.append)
    return args, reported


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--train-iters 10 --train-samples 80", ("--train-iters 10", "--train-samples 80")),
        ("--train-samples 80 --lr-warmup-iters 2", ("--lr-warmup-iters 2", "--lr-warmup-samples")),
        ("--train-samples 80 --lr-decay-iters 9", ("--lr-decay-iters 9", "--lr-decay-samples")),
        ("--train-iters 10 --lr-warmup-samples 9", ("--lr-warmup-samples 9", "--lr-warmup-iters")),
        ("--train-iters 10 --lr-warmup-iters 10", ("--lr-warmup-iters 10", "--train-iters")),
        (
            "--train-iters 99 --lr-decay-iters 5 --lr-warmup-iters 6",
            ("--lr-warmup-iters 6", "of 5"),
        ),
        ("--train-samples 80 --lr-warmup-samples 81", ("--lr-warmup-samples 81",)),
        ("--save-wgrads-interval 2", ("--save-wgrads-interval", "--save")),
        ("--dataloader-type external", ("--dataloader-type external",)),
        ("--train-iters 10 --log-interval 0", ("--log-interval is 0",)),
        ("--lr 1e-3 --min-lr 1e-2", ("--min-lr 0.01", "--lr 0.001")),
        ("--train-iters 9 --lr-decay-style WSD", ("WSD", "--lr-wsd-decay-iters")),
        ("--train-samples 9 --lr-decay-style WSD", ("WSD", "--lr-wsd-decay-samples")),
        ("--vocab-size 0", ("--vocab-size is 0",)),
        (
            "--eod-mask-loss --context-parallel-size 2",
            ("--eod-mask-loss", "--context-parallel-size 2", "--calculate-per-token-loss"),
        ),
        ("--split a,b", ("--split a,b",)),
        ("--split 1,1e-3,0", ("--split 1,1e-3,0",)),
        ("--split 90:10", ("--split 90:10",)),
        ("--split 1,1,1,1", ("--split 1,1,1,1",)),
        ("--split 0,0,0", ("--split 0,0,0",)),
        ("--train-iters 10 --tensorboard-log-interval 0", ("--tensorboard-log-interval is 0",)),
    ],
)
def test_contradiction_raises_error_naming_the_flags(
    parser: argparse.ArgumentParser, flags: str, named: tuple[str, ...]
) -> None:
    with pytest.raises(LETError) as error:
        complete(parser, *flags.split())
    assert all(part in str(error.value) for part in named)


@pytest.mark.parametrize(
    "flags",
    [
        "--train-iters 10 --lr-warmup-iters 9",
        "--train-samples 80 --lr-warmup-samples 8",
        "--train-iters 10 --lr-decay-style WSD --lr-wsd-decay-iters 2",
        "--split 99./.5/0",
        "--eod-mask-loss --context-parallel-size 2 --calculate-per-token-loss",
        "",
    ],
)
def test_consistent_length_and_warmup_are_accepted(
    parser: argparse.ArgumentParser, flags: str
) -> None:
    complete(parser, *flags.split(), "--eval-interval", "5", "--data-path", "x")


@pytest.mark.parametrize(
    ("flags", "evaluated"),
    [
        ("--data-path x", True),
        ("--data-path x --split 90,10,0", True),
        ("--data-path x --split 90/10", True),
        ("--data-path x --split 100,0,0", False),
        ("--data-path x --split 100", False),
        ("--data-path x --split 90,0,10", False),
        ("--train-data-path x", False),
        ("--train-data-path x --valid-data-path y", True),
        ("--mock-data --split 100,0,0", True),
    ],
)
def test_run_without_validation_data_is_not_evaluated_and_says_so(
    parser: argparse.ArgumentParser, flags: str, evaluated: bool
) -> None:
    args, reported = complete(parser, *flags.split(), "--eval-iters", "3", "--eval-interval", "5")
    assert args.eval_iters == (3 if evaluated else 0)
    assert bool(reported) != evaluated


@pytest.mark.parametrize("valid", [True, False])
def test_validation_data_of_a_blend_file_are_found(
    parser: argparse.ArgumentParser, tmp_path: Path, valid: bool
) -> None:
    blend = tmp_path / "blend.json"
    blend.write_text(json.dumps({"train": ["x"], "valid": ["y"] if valid else None, "test": None}))
    flags = ("--per-split-data-args-path", str(blend), "--eval-iters", "3", "--eval-interval", "5")
    assert complete(parser, *flags)[0].eval_iters == 3 * valid


@pytest.mark.parametrize("interval", [(), ("--eval-interval", "0"), ("--eval-interval", "-1")])
def test_run_without_an_interval_is_evaluated_at_its_end(
    parser: argparse.ArgumentParser, interval: tuple[str, ...]
) -> None:
    args, reported = complete(parser, "--data-path", "x", "--train-iters", "1000", *interval)
    assert args.eval_interval > 1000 and args.eval_iters
    assert "--eval-interval" in reported[0]


def test_split_of_a_recipe_gives_way_to_a_path_per_split(parser: argparse.ArgumentParser) -> None:
    flags = "--train-data-path x --valid-data-path y --split 90,10,0 --eval-interval 5"
    args, reported = complete(parser, *flags.split())
    assert args.split is None and "--split 90,10,0" in reported[0]


def test_full_validation_alone_means_one_set(parser: argparse.ArgumentParser) -> None:
    args, reported = complete(
        parser, "--data-path", "x", "--full-validation", "--eval-interval", "5"
    )
    assert args.multiple_validation_sets and "--full-validation" in reported[0]


def test_full_validation_reads_one_sample_per_data_parallel_rank(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    flags = ("--data-path", "x", "--full-validation", "--eval-interval", "5")
    args, reported = complete(parser, *flags, "--tensor-model-parallel-size", "2")
    assert (args.eval_micro_batch_size, args.eval_global_batch_size) == (1, 2)
    assert len(reported) == 1
    _, reported = complete(parser, *flags, "--eval-micro-batch-size", "4")
    assert reported[1].startswith("--eval-micro-batch-size is 1, because --full-validation")
