"""LET in any Megatron-LM 0.19 training script, in three lines.

    from megatron_let import integration as let
    args = parse_and_validate_args(extra_args_provider=let.add_arguments, ...)
    let.enable(args)

The script's own model builder, data provider and forward step stay as they are.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from megatron.training import get_tokenizer, print_rank_0

from megatron_let.compat import PATCHES, PatchSet
from megatron_let.config.arguments import (
    add_arguments,
    let_config_from_args,
    loaded_checkpoint,
    num_steps,
    resumed_step,
)
from megatron_let.config.validation import check_supported, check_teacher_shard
from megatron_let.data.token_alignment import Realigner, load_realigner, teacher_length
from megatron_let.errors import LETError
from megatron_let.methods import TrainingRun, build_method
from megatron_let.metrics.guard import load_guard
from megatron_let.metrics.write import MetricsFile, forget_stale_averages
from megatron_let.teacher.inspect import TeacherFolder, inspect_teacher
from megatron_let.teacher.model import Sharding
from megatron_let.teacher.tokenizer import check_same_tokenizer
from megatron_let.teacher.validation import check_fits, check_vocabulary_size

__all__ = ["add_arguments", "enable", "realigner"]

logger = logging.getLogger(__name__)

_TRAINING = "megatron.training.training:"


def enable(args: argparse.Namespace) -> PatchSet:
    """Turn LET and its metrics on for the coming `pretrain()`, as the flags say.

    Args:
        args: what Megatron's `parse_and_validate_args` returned.

    Returns:
        The applied patches; `undo()` takes them back.

    Raises:
        LETError: the request cannot be carried out.
        PatchError: Megatron is not the version that the patches were made for.
    """
    patches = PatchSet()
    try:
        _enable_metrics(args, patches)
        _enable_teacher(args, patches)
    except Exception:
        patches.undo()
        raise
    if patches.applied:
        print_rank_0(f"megatron_let: {patches.describe()}")
    return patches


def _enable_metrics(args: argparse.Namespace, patches: PatchSet) -> None:
    if args.let_metrics_path is None:
        if args.let_guard:
            raise LETError("--let-guard watches the metrics file; give --let-metrics-path.")
        return
    observe = {}
    if args.let_guard and args.let_method not in (None, "none"):
        guard = load_guard(args.let_metrics_path, args.let_guard_baseline, _warn)
        observe["observe"] = guard.observe
    metrics = MetricsFile(args.let_metrics_path, args.seq_length, **observe)
    patches.apply_all(
        PATCHES,
        {
            _TRAINING + "train_step": metrics.wrap_train_step,
            _TRAINING + "evaluate": metrics.wrap_evaluate,
            _TRAINING + "evaluate_and_print_results": metrics.wrap_evaluate_and_print_results,
        },
    )


def _teacher_sharding(args: argparse.Namespace) -> Sharding | None:
    if not args.let_teacher_shard:
        return None
    from megatron_let.engines.deepspeed.teacher_shard import TeacherSharding

    return TeacherSharding()


def _warn(message: str) -> None:
    print(f"LET: warning: {message}", flush=True)


def realigner(args: argparse.Namespace) -> Realigner | None:
    """What gives the samples the teacher's own tokens, if the flags ask for it.

    For data sets of a user's own: wrap the training set in `data.realign.RealignedDataset`.
    """
    config = let_config_from_args(args)
    over = resumed_step(args) >= config.stop_step
    if not (config.enabled and config.cross_tokenizer) or over or config.teacher is None:
        return None
    folder = inspect_teacher(config.teacher)
    return load_realigner(args.tokenizer_type, Path(args.tokenizer_model), folder, args.seq_length)


def _enable_teacher(args: argparse.Namespace, patches: PatchSet) -> None:
    config = let_config_from_args(args)
    if not config.enabled:
        return
    resumed = resumed_step(args)
    if config.method != "rkd" and resumed >= config.stop_step:
        print_rank_0(f"LET: resumed at step {resumed}, past --let-stop-step; no teacher is needed")
        return
    assert config.teacher is not None
    check_supported(args)
    check_teacher_shard(args)
    folder = inspect_teacher(config.teacher)
    check_fits(config, folder, args)
    length = None
    if config.cross_tokenizer and config.method == "let":
        length = teacher_length(args.seq_length, folder.max_positions)
    else:
        _check_tokenizer(folder, args)
    method = build_method(
        TrainingRun(
            config=config,
            folder=folder,
            vocab_size=get_tokenizer().vocab_size,
            seed=args.seed,
            num_steps=num_steps(args),
            current_step=lambda: int(args.curr_iteration),
            loaded_checkpoint=lambda: loaded_checkpoint(args),
            report=print_rank_0,
            teacher_length=length,
            sharding=_teacher_sharding(args),
        )
    )
    log = {_TRAINING + "training_log": forget_stale_averages}
    patches.apply_all(PATCHES, method.wrappers() | log)
    print_rank_0("LET: " + method.describe())


def _check_tokenizer(folder: TeacherFolder, args: argparse.Namespace) -> None:
    tokenizer = get_tokenizer()
    check_vocabulary_size(folder, tokenizer.vocab_size)
    if args.tokenizer_type == "NullTokenizer":
        print_rank_0(
            "LET: --tokenizer-type NullTokenizer has no tokens to compare with the teacher's; the"
            " data must be of the teacher's tokenizer"
        )
    else:
        check_same_tokenizer(tokenizer, folder)
