"""Complete a run's length, schedule and evaluation, or refuse them in terms of their flags.

Megatron asserts these late and without naming the flag, or fails at the first evaluation.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

from megatron_let.config.arguments import flag
from megatron_let.errors import LETError

# More steps than any run has; Megatron multiplies it by the batch size.
_NEVER = 2**31
# What Megatron writes below --save at an interval.
_SAVED = ("params", "wgrads", "dgrads", "activations", "tokens_per_expert")
_DATA_BY_SPLIT = ("train_data_path", "valid_data_path", "test_data_path")


def complete_run_settings(args: argparse.Namespace, report: Callable[[str], None]) -> None:
    """Check the run's length and warm-up, and complete the settings of its data and evaluation.

    Args:
        args: Megatron's arguments before its validation.
        report: called with a sentence for each setting that is changed.

    Raises:
        LETError: names the flags that contradict each other.
    """
    _check_length(args)
    _check_warmup(args)
    _check_rates(args)
    _check_loss(args)
    _check_intervals(args)
    _check_data_settings(args)
    if args.reset_attention_mask:
        # Overrides the host's flag, without which attention would be causal only.
        args.create_attention_mask_in_dataloader = True
    names = (*_DATA_BY_SPLIT, "per_split_data_args_path")
    by_split = [name for name in names if _given(args, name)]
    if by_split and args.split is not None:
        report(f"--split {args.split} is ignored, because {flag(by_split[0])} is given")
        args.split = None
    if args.full_validation:
        _complete_full_validation(args, report)
    _complete_evaluation(args, report)


def _given(args: argparse.Namespace, name: str) -> bool:
    return bool(getattr(args, name))


def _check_length(args: argparse.Namespace) -> None:
    if args.train_iters and args.train_samples:
        raise LETError(
            f"--train-iters {args.train_iters} and --train-samples {args.train_samples} both give"
            " the length; give one of them, with a recipe that does not set the other."
        )
    unit, other = ("samples", "iters") if args.train_samples else ("iters", "samples")
    for name in (f"lr_warmup_{other}", f"lr_decay_{other}", f"lr_wsd_decay_{other}"):
        if _given(args, name):
            raise LETError(
                f"{flag(name)} {getattr(args, name)} cannot be combined with --train-{unit}; give"
                f" {flag(name.replace(other, unit))}."
            )


def _check_warmup(args: argparse.Namespace) -> None:
    unit = "samples" if args.train_samples else "iters"
    length = getattr(args, f"train_{unit}")
    decay, warmup = getattr(args, f"lr_decay_{unit}") or length, getattr(args, f"lr_warmup_{unit}")
    if length and warmup and warmup >= decay:
        raise LETError(
            f"--lr-warmup-{unit} {warmup} is not shorter than the schedule of {decay} {unit};"
            f" give a smaller --lr-warmup-{unit}, or more --train-{unit}."
        )


def _check_rates(args: argparse.Namespace) -> None:
    if args.lr is not None and args.min_lr > args.lr:
        raise LETError(
            f"--min-lr {args.min_lr:g} is above --lr {args.lr:g}; give a smaller --min-lr."
        )
    unit = "samples" if args.train_samples else "iters"
    if args.lr_decay_style == "WSD" and not _given(args, f"lr_wsd_decay_{unit}"):
        raise LETError(
            f"--lr-decay-style WSD needs the length of its decay; give --lr-wsd-decay-{unit}."
        )


def _check_loss(args: argparse.Namespace) -> None:
    # Megatron divides each rank's part of a sequence by its own unmasked tokens.
    if args.eod_mask_loss and args.context_parallel_size > 1 and not args.calculate_per_token_loss:
        raise LETError(
            f"--eod-mask-loss with --context-parallel-size {args.context_parallel_size} weights"
            " tokens by the part of the sequence that they are in; give --calculate-per-token-loss"
            " too."
        )


def _check_data_settings(args: argparse.Namespace) -> None:
    if args.vocab_size is not None and args.vocab_size < 1:
        raise LETError(f"--vocab-size is {args.vocab_size}; give 1 or more.")
    # Megatron reads any digits in it: 1e-3 as two weights, 1 and 3.
    weights = re.split("[,/]", args.split or "1")
    plain = all(re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", weight.strip()) for weight in weights)
    if not plain or len(weights) > 3 or not any(map(float, weights)):
        raise LETError(
            f"--split {args.split} is not a list of up to three weights, for training, validation,"
            " test; give decimal numbers such as 99,1,0."
        )


def _complete_full_validation(args: argparse.Namespace, report: Callable[[str], None]) -> None:
    if not args.multiple_validation_sets:
        # Megatron 0.19.2 reads the result of --full-validation as a list of sets.
        report("--full-validation turns on --multiple-validation-sets, with one set")
        args.multiple_validation_sets = True
    # Its sampler gives each rank one sample at a time; larger batches would read the set again.
    parts = ("tensor_model", "pipeline_model", "context")
    num_model_ranks = math.prod(getattr(args, f"{part}_parallel_size") for part in parts)
    # As Megatron reads it, which refuses a number that is not divisible.
    num_ranks = max(1, int(os.environ.get("WORLD_SIZE", "1")) // num_model_ranks)
    sizes = {"eval_micro_batch_size": 1, "eval_global_batch_size": num_ranks}
    for name, size in sizes.items():
        if getattr(args, name) not in (None, size):
            report(f"{flag(name)} is {size}, because --full-validation reads one sample per rank")
        setattr(args, name, size)


def _check_intervals(args: argparse.Namespace) -> None:
    if args.dataloader_type == "external":
        raise LETError(
            "--dataloader-type external needs a script with a data provider of its own; drop it,"
            " or use the three lines of megatron_let.integration."
        )
    for name in ("log_interval", "tensorboard_log_interval"):
        if getattr(args, name) < 1:
            raise LETError(f"{flag(name)} is {getattr(args, name)}; give 1 or more.")
    for name in (f"save_{what}_interval" for what in _SAVED):
        if _given(args, name) and not args.save:
            raise LETError(f"{flag(name)} needs a folder to write to; give --save.")


def _complete_evaluation(args: argparse.Namespace, report: Callable[[str], None]) -> None:
    if args.eval_iters and not _has_validation_data(args):
        report("there is no validation data, so nothing is evaluated")
        args.eval_iters = 0
    if not args.eval_interval or args.eval_interval < 0:
        if args.eval_iters:
            report("without --eval-interval, the run is evaluated after its last step only")
        args.eval_interval = _NEVER


def _has_validation_data(args: argparse.Namespace) -> bool:
    if args.mock_data or args.valid_data_path:
        return True
    if args.per_split_data_args_path:
        path = Path(args.per_split_data_args_path)
        return not path.is_file() or bool(json.loads(path.read_text()).get("valid"))
    weights = [float(weight) for weight in re.split("[,/]", args.split or "")[1:2] if weight]
    # Without --split Megatron's default has a validation split.
    has_split = args.split is None or any(weights)
    return has_split and not any(_given(args, name) for name in _DATA_BY_SPLIT)
