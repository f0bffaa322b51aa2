"""The `--let-*` flags, and the only place that reads Megatron's arguments for LET."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from megatron_let.config import METHODS, LETConfig, LETError
from megatron_let.teacher.folder import TeacherFolder
from megatron_let.teacher.model import tapped_layer

_PREFIX = "let_"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `--let-*` flags; pass it as Megatron's `extra_args_provider`."""
    default = LETConfig()
    group = parser.add_argument_group("Late-to-Early Training (LET)")

    def add(name: str, help_text: str, **options: Any) -> None:
        # None marks a flag that was not given, so that a useless one can be named.
        group.add_argument(f"--let-{name}", default=None, help=help_text, **options)

    add("method", f"what to train with (default: {default.method})", choices=METHODS)
    add("teacher", "Hugging Face folder or .gguf file of the small trained model", type=Path)
    add("layer", f"k, the student's aligned layer, from 1 (default: {default.layer})", type=int)
    add("weight", f"lambda_0, weight at the first step (default: {default.weight})", type=float)
    add(
        "stop-step",
        f"S_stop, step at which the weight is 0 (default: {default.stop_step})",
        type=int,
    )
    add("teacher-layer", "last, middle or a number from 1 (default: last)")
    add(
        "teacher-final-norm",
        "apply the teacher's final norm to its last layer (default: yes)",
        action=argparse.BooleanOptionalAction,
    )
    add(
        "teacher-dtype",
        f"precision of the teacher (default: {default.teacher_dtype})",
        choices=("bf16", "fp32"),
    )
    group.add_argument(
        "--let-metrics-path", type=Path, default=None, help="JSON lines file, one a step"
    )
    _add_engine_arguments(parser)
    return parser


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine",
        choices=("megatron", "deepspeed"),
        default="megatron",
        help="what takes a training step (default: megatron)",
    )
    group.add_argument(
        "--deepspeed-config", type=Path, default=None, help="DeepSpeed's JSON config"
    )
    group.add_argument(
        "--let-teacher-shard",
        action="store_true",
        help="shard the teacher over the replicas by ZeRO-3 (--engine deepspeed)",
    )


def check_teacher_shard(args: argparse.Namespace) -> None:
    """Refuse a sharded teacher without ZeRO.

    Raises:
        LETError: names both flags.
    """
    if args.let_teacher_shard and args.engine != "deepspeed":
        raise LETError(
            f"--let-teacher-shard is ZeRO-3's and cannot be used with --engine {args.engine}; give"
            " --engine deepspeed or drop it."
        )


def let_config_from_args(args: argparse.Namespace) -> LETConfig:
    """Build the config from parsed arguments.

    Raises:
        LETError: a value is out of range.
    """
    names = LETConfig.__dataclass_fields__
    given = {
        name: getattr(args, _PREFIX + name)
        for name in names
        if getattr(args, _PREFIX + name, None) is not None
    }
    config = LETConfig(**given)
    useless = sorted(given.keys() - {"method"})
    if config.method == "none" and useless:
        flags = ", ".join("--let-" + name.replace("_", "-") for name in useless)
        warnings.warn(f"{flags} has no effect with --let-method none.", stacklevel=1)
    return config


def resumed_step(args: argparse.Namespace) -> int:
    """0-based step at which the run will begin, from the tracker file of `--load`; 0 if new."""
    if args.load is None or args.finetune:
        return 0
    if args.ckpt_step is not None:
        return int(args.ckpt_step)
    tracker = Path(args.load) / "latest_checkpointed_iteration.txt"
    content = tracker.read_text().strip() if tracker.is_file() else ""
    return int(content) if content.isdecimal() else 0


# Flag value under which LET cannot work -> why, and what to do.
_REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("cuda_graph_impl", "none", "CUDA graphs bypass the hook on layer k; drop --cuda-graph-impl"),
    (
        "overlap_moe_expert_parallel_comm",
        False,
        "its schedule bypasses the hook on layer k; drop --overlap-moe-expert-parallel-comm",
    ),
    (
        "moe_expert_rank_capacity_factor",
        None,
        "it runs a step twice, outside LET; drop --moe-expert-rank-capacity-factor",
    ),
    ("hybrid_layer_pattern", None, "hybrid models have no k-th transformer layer; use a GPT model"),
    ("use_megatron_fsdp", False, "it was never tried; use --use-distributed-optimizer"),
    ("use_torch_fsdp2", False, "it was never tried; use --use-distributed-optimizer"),
    ("sft", False, "the teacher sees whole sequences, not packed ones; drop --sft"),
    (
        "reset_attention_mask",
        False,
        "the teacher attends across documents; drop --reset-attention-mask",
    ),
    (
        "reset_position_ids",
        False,
        "the teacher counts positions from the sequence's start; drop --reset-position-ids",
    ),
    (
        "dataloader_inter_document_masking",
        False,
        "the teacher attends across documents; drop --dataloader-inter-document-masking",
    ),
    (
        "hybrid_context_parallel",
        False,
        "its sequences have no fixed length; drop --hybrid-context-parallel",
    ),
    ("perform_rl_step", False, "LET is for pretraining; drop --perform-rl-step"),
    ("gtp_weight_remat_size", 1, "it was never tried; drop --tensor-parallel-num-weight-shards"),
)


_FLAG_NAMES = {"gtp_weight_remat_size": "--tensor-parallel-num-weight-shards"}


def check_supported(args: argparse.Namespace) -> None:
    """Refuse Megatron flags under which the alignment would be bypassed or wrong.

    Raises:
        LETError: names the flag and what to do.
    """
    for name, allowed, reason in _REFUSED:
        value = getattr(args, name, allowed)
        if value not in (allowed, None):
            flag = _FLAG_NAMES.get(name, "--" + name.replace("_", "-"))
            raise LETError(f"--let-method let cannot be used with {flag} {value}: {reason}.")


# What the entry's own forward step does not do; a user's script with LET may.
_NOT_IN_THE_ENTRY = (
    "sft",
    "fim_data",
    "mtp_num_layers",
    "hybrid_layer_pattern",
    "dataloader_inter_document_masking",
    "hybrid_context_parallel",
    "perform_rl_step",
    "logits_load_dir",
    "heterogeneous_layers_config_path",
    "vision_pretraining",
)


def check_entry_supports(args: argparse.Namespace) -> None:
    """Refuse flags that the entry would read and not act on.

    Raises:
        LETError: names the flag.
    """
    for name in _NOT_IN_THE_ENTRY:
        if getattr(args, name, None):
            flag = "--" + name.replace("_", "-")
            raise LETError(
                f"{flag} is not part of this entry; use it in a training script of your own with"
                " the three lines of megatron_let.integration."
            )


def check_fits(config: LETConfig, folder: TeacherFolder, args: argparse.Namespace) -> None:
    """Check the teacher and the aligned layers against the student and its data.

    Raises:
        LETError: names both sizes.
    """
    if config.layer > args.num_layers:
        raise LETError(
            f"--let-layer is {config.layer} but the student has {args.num_layers} layers; give a"
            f" number from 1 to {args.num_layers}."
        )
    tapped_layer(config.teacher_layer, folder.num_layers)
    if folder.max_positions is not None and args.seq_length > folder.max_positions:
        raise LETError(
            f"--seq-length is {args.seq_length} but the teacher was built for "
            f"{folder.max_positions} positions; shorten the sequence or use another teacher."
        )
    steps = args.train_iters
    if steps is None:
        steps = args.train_samples // args.global_batch_size
    if config.stop_step > steps:
        warnings.warn(
            f"--let-stop-step {config.stop_step} is beyond the run's {steps} steps:"
            " the weight never reaches 0 and the teacher stays to the end.",
            stacklevel=2,
        )


def check_vocabulary_size(folder: TeacherFolder, vocab_size: int) -> None:
    """Check that the teacher's embedding has a row for each of the student's tokens.

    Raises:
        LETError: names both sizes.
    """
    if vocab_size > folder.vocab_size:
        raise LETError(
            f"The student's tokenizer has {vocab_size} tokens but the teacher knows "
            f"{folder.vocab_size}; train the student on the teacher's tokenizer."
        )
