"""LET in any Megatron-LM 0.19 training script, in three lines.

    from megatron_let import integration as let
    args = parse_and_validate_args(extra_args_provider=let.add_arguments, ...)
    let.enable(args)

The script's own model builder, data provider and forward step stay as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Callable
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
from megatron_let.config.let_config import LETConfig
from megatron_let.config.validation import check_supported, check_teacher_shard
from megatron_let.data.token_alignment import Realigner, load_realigner, teacher_length
from megatron_let.errors import LETError
from megatron_let.methods.base import TaughtForwardBackward
from megatron_let.methods.distillation import DistilledForwardBackward
from megatron_let.methods.let import AlignedForwardBackward
from megatron_let.methods.projection_training import ProjectionTraining
from megatron_let.methods.schedules import alignment_weight
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
    if config.cross_tokenizer:
        length = teacher_length(args.seq_length, folder.max_positions)
        folder = dataclasses.replace(folder, own_length=length)
    else:
        _check_tokenizer(folder, args)
    projection = _projection(config, folder, args)
    if projection is not None:
        patches.apply_all(PATCHES, {_TRAINING + "setup_model_and_optimizer": projection.wrap_setup})
    method = _method(config, folder, args, projection)
    patches.apply_all(
        PATCHES,
        {
            _TRAINING + "get_forward_backward_func": method.wrap_getter,
            _TRAINING + "training_log": forget_stale_averages,
        },
    )
    print_rank_0("LET: " + _description(config, folder))


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


def _current_step(args: argparse.Namespace) -> Callable[[], int]:
    return lambda: int(args.curr_iteration)


def _projection(
    config: LETConfig, folder: TeacherFolder, args: argparse.Namespace
) -> ProjectionTraining | None:
    if config.projection != "learned":
        return None
    step = _current_step(args)

    def is_last_step() -> bool:
        return alignment_weight(step() + 1, config.weight, config.stop_step) == 0

    return ProjectionTraining(
        layer=config.layer,
        teacher_width=folder.hidden_size,
        seed=args.seed,
        loaded_checkpoint=lambda: loaded_checkpoint(args),
        is_last_step=is_last_step,
        report=print_rank_0,
    )


def _method(
    config: LETConfig,
    folder: TeacherFolder,
    args: argparse.Namespace,
    projection: ProjectionTraining | None,
) -> TaughtForwardBackward:
    """What runs a global batch."""
    step = _current_step(args)
    if config.method == "let":
        return AlignedForwardBackward(
            config,
            folder,
            step,
            num_steps(args),
            print_rank_0,
            _teacher_sharding(args),
            projection=projection,
        )
    vocab_size = get_tokenizer().vocab_size
    return DistilledForwardBackward(config, folder, vocab_size, step, print_rank_0)


def _description(config: LETConfig, folder: TeacherFolder) -> str:
    teacher = f"{config.teacher} (width {folder.hidden_size})"
    if config.method == "let":
        return (
            f"layer {config.layer} learns from {teacher}, weight {config.weight} falling to 0 at"
            f" step {config.stop_step}"
        )
    end = "the end" if config.method == "rkd" else f"step {config.stop_step}"
    return (
        f"the output distribution of {teacher} has weight {config.kd_weight} in the targets to"
        f" {end}"
    )
