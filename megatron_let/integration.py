"""LET in any Megatron-LM 0.19 training script, in three lines.

    from megatron_let import integration as let
    args = parse_and_validate_args(extra_args_provider=let.add_arguments, ...)
    let.enable(args)

The script keeps its model builder, data provider and forward step.
"""

import argparse
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_tokenizer, print_rank_0

from megatron_let.compat import PatchSet
from megatron_let.config.arguments import add_arguments, let_config_from_args, num_steps
from megatron_let.config.hybrid_pattern import describe_layer
from megatron_let.config.let_config import METHODS, LETConfig
from megatron_let.config.validation import (
    check_script_masks_documents,
    check_supported,
    check_teacher_shard,
)
from megatron_let.data.token_alignment import (
    TokenAligner,
    load_token_aligner,
    read_teacher_tokenizer,
    teacher_length,
)
from megatron_let.engines import load_engine
from megatron_let.errors import LETError
from megatron_let.methods import TrainingRun, build_method
from megatron_let.metrics.guard import load_guard
from megatron_let.metrics.write import MetricsFile, drop_stale_averages
from megatron_let.run.output_folder import pin_hub_ids, resolve_teacher_dtype
from megatron_let.run.resume import loaded_checkpoint, resumed_step
from megatron_let.teacher.documents import Documents
from megatron_let.teacher.inspect import TeacherFolder, inspect_teacher
from megatron_let.teacher.tokenizer import check_same_tokenizer
from megatron_let.teacher.validation import check_fits, check_vocabulary_size

__all__ = ["add_arguments", "enable", "token_aligner"]

_TRAINING = "megatron.training.training:"


def enable(args: argparse.Namespace) -> PatchSet:
    """Enable LET and its metrics for the next `pretrain()`, as configured by Megatron's `args`.

    Returns:
        The applied patches; `undo()` removes them.

    Raises:
        LETError: the request cannot be carried out.
        PatchError: the installed Megatron is not a version that the patches fit.
    """
    if args.engine != "megatron":
        raise LETError(
            f"--engine {args.engine} builds its own model and optimizer, which only the entry"
            " megatron_let.pretrain sets up; train with that entry, or give --engine megatron."
        )
    if METHODS[args.let_method or "none"].learns_from is not None:
        check_script_masks_documents(args)
    pin_hub_ids(args)
    if choice := resolve_teacher_dtype(args):
        print_rank_0(f"megatron_let: {choice}")
    return enable_on_engine(args, let_config_from_args(args))


def enable_on_engine(args: argparse.Namespace, config: LETConfig) -> PatchSet:
    """Apply `enable` for any engine, once `Engine.enable` has set it up; see `enable`."""
    wrappers = _metrics_wrappers(args, config) | _method_wrappers(args, config)
    patches = PatchSet().apply_all(wrappers)
    agreed = {f"commits of {given}": pinned for given, pinned in args.let_hub_ids.items()}
    if config.enabled:
        agreed["precisions of the teacher (--let-teacher-dtype)"] = config.teacher_dtype
    if agreed:
        check = functools.partial(_check_agreement_before, agreed)
        patches.apply_all({_TRAINING + "setup_model_and_optimizer": check})
    if patches.applied:
        print_rank_0(f"megatron_let: {patches.describe()}")
    return patches


def token_aligner(args: argparse.Namespace, config: LETConfig | None = None) -> TokenAligner | None:
    """Return the aligner for `--let-cross-tokenizer`, else None.

    A script with its own data sets wraps the training set in
    `data.token_alignment.TokenAlignedDataset` with it.
    """
    config = config or let_config_from_args(args)
    over = resumed_step(args) >= config.stop_step
    if not (config.enabled and config.aligns_tokens) or over or config.teacher is None:
        return None
    folder = inspect_teacher(config.teacher)
    return load_token_aligner(
        args.tokenizer_type, Path(args.tokenizer_model), folder, args.seq_length
    )


def _metrics_wrappers(args: argparse.Namespace, config: LETConfig) -> dict[str, Callable[..., Any]]:
    """Return {patch target: wrapper} of the functions that write the metrics file."""
    if args.let_metrics_path is None:
        if args.let_guard:
            raise LETError("--let-guard watches the metrics file; give --let-metrics-path.")
        return {}
    if args.skip_train:
        return {}  # the steps of the loaded checkpoint have their rows
    observe = {}
    if args.let_guard and config.traits.learns_from is not None:
        guard = load_guard(args.let_metrics_path, args.let_guard_baseline, _warn)
        observe["observe"] = guard.observe
    metrics = MetricsFile(args.let_metrics_path, args.seq_length, **observe)
    return {
        _TRAINING + "train_step": metrics.wrap_train_step,
        _TRAINING + "evaluate": metrics.wrap_evaluate,
        _TRAINING + "evaluate_and_print_results": metrics.wrap_evaluate_and_print_results,
    }


def _warn(message: str) -> None:
    print(f"LET: warning: {message}", flush=True)


def _method_wrappers(args: argparse.Namespace, config: LETConfig) -> dict[str, Callable[..., Any]]:
    """Return {patch target: wrapper} of the method; empty if no step needs a teacher."""
    if not config.enabled:
        return {}
    resumed = resumed_step(args)
    if config.traits.ends_at_stop_step and resumed >= config.stop_step:
        print_rank_0(f"LET: resumed at step {resumed}, past --let-stop-step; no teacher is needed")
        return {}
    assert config.teacher is not None
    check_supported(args)
    check_teacher_shard(args)
    folder = inspect_teacher(config.teacher)
    check_fits(config, folder, args)
    length = None
    if config.aligns_tokens:
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
            sharding=load_engine(args.engine).teacher_sharding(args),
            documents=_documents(args, config, folder),
        )
    )
    print_rank_0("LET: " + method.describe())
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if pattern is not None and config.traits.learns_from == "states":
        print_rank_0("LET: " + describe_layer(config.layer, pattern))
    return method.wrappers() | {_TRAINING + "training_log": drop_stale_averages}


def _documents(
    args: argparse.Namespace, config: LETConfig, folder: TeacherFolder
) -> Documents | None:
    """Return the borders within the teacher's rows; None without Megatron's flags for them."""
    if not (args.reset_position_ids or args.reset_attention_mask):
        return None
    aligns = config.aligns_tokens
    eod = read_teacher_tokenizer(folder).eos_token_id if aligns else get_tokenizer().eod
    if eod >= folder.vocab_size:
        raise LETError(
            f"A document ends with token {eod}, and the teacher's vocabulary has"
            f" {folder.vocab_size} ids; prepare the data with the teacher's tokenizer."
        )
    return Documents(eod, args.reset_position_ids, args.reset_attention_mask)


def _check_agreement_before(
    values: dict[str, str], setup: Callable[..., Any]
) -> Callable[..., Any]:
    """Compare {name: value} over all ranks, then run `setup`."""

    @functools.wraps(setup)
    def check_and_run(*args: Any, **kwargs: Any) -> Any:
        if not _is_same_on_all_ranks(values):
            _raise_difference(values)
        return setup(*args, **kwargs)

    return check_and_run


def _is_same_on_all_ranks(values: dict[str, str]) -> bool:
    """Compare a hash by one all-reduce of 16 bytes; gathering objects grows with the ranks."""
    digest = hashlib.sha256(repr(sorted(values.items())).encode()).digest()
    number = int.from_bytes(digest[:7])
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    bounds = torch.tensor([number, -number], device=device)
    torch.distributed.all_reduce(bounds, op=torch.distributed.ReduceOp.MAX)
    largest, smallest = bounds.tolist()
    return bool(largest == -smallest)


def _raise_difference(values: dict[str, str]) -> None:
    """Gather the values of all ranks, and name the first that differs.

    Raises:
        LETError: always, on every rank.
    """
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, values)
    for name, first in found[0].items():
        other = next((theirs[name] for theirs in found if theirs[name] != first), None)
        if other is not None:
            raise LETError(
                f"The nodes have different {name}: {first} and {other}; give one of them.",
                collective=True,
            )


def _check_tokenizer(folder: TeacherFolder, args: argparse.Namespace) -> None:
    tokenizer = get_tokenizer()
    check_vocabulary_size(folder, tokenizer.vocab_size)
    if args.tokenizer_type == "NullTokenizer":
        print_rank_0(
            "LET: --tokenizer-type NullTokenizer has no tokens to compare with the teacher's; the"
            " data must be of the teacher's tokenizer"
        )
    else:
        check_same_tokenizer(tokenizer, folder.path)
