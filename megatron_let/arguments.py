"""The `--let-*` flags, and the only place that reads Megatron's arguments for LET."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from megatron_let.config import (
    LAYER_PAIRS,
    LOSSES,
    METHODS,
    PLACEMENTS,
    PROJECTIONS,
    LETConfig,
    LETError,
)
from megatron_let.ops.cca import TOKENS_PER_FEATURE
from megatron_let.teacher.folder import TeacherFolder
from megatron_let.teacher.model import tapped_layer

_PREFIX = "let_"

_TEACHER = {"method", "teacher", "teacher_dtype"}
_DISTILLATION = _TEACHER | {"kd_weight", "kd_temperature", "kd_top_k", "kd_fade"}
# Settings that a method reads.
_USED = {
    "none": {"method"},
    "let": LETConfig.__dataclass_fields__.keys() - (_DISTILLATION - _TEACHER),
    "rkd": _DISTILLATION,
    "salt": _DISTILLATION | {"stop_step"},
}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `--let-*` flags; pass it as Megatron's `extra_args_provider`."""
    default = LETConfig()
    group = parser.add_argument_group("Late-to-Early Training (LET)")

    def add(name: str, help_text: str, **options: Any) -> None:
        # None marks a flag that was not given, so that a useless one can be named.
        group.add_argument(f"--let-{name}", default=None, help=help_text, **options)

    add("method", f"what to train with (default: {default.method})", choices=METHODS)
    add("teacher", "Hugging Face folder or .gguf file of the small trained model", type=Path)
    add(
        "layer",
        f"k, the student's layer: middle, last or a number (default: {default.layer})",
        type=_layer,
    )
    group.add_argument(
        "--let-layer-pair",
        action=_LayerPair,
        choices=LAYER_PAIRS,
        default=argparse.SUPPRESS,
        help="both layers by the paper's name, teacher's first: Last or Middle to Early (the"
        " third), Middle or Last; what stands later on the command line wins",
    )
    add("loss", f"what is aligned (default: {default.loss})", choices=LOSSES)
    add(
        "projection",
        "what brings the student's state to the teacher's width: interpolation, or a linear layer"
        f" that learns with the student (default: {default.projection})",
        choices=PROJECTIONS,
    )
    add("weight", f"lambda_0, weight at the first step (default: {default.weight})", type=float)
    add(
        "stop-step",
        f"S_stop, step at which the teacher leaves (default: {default.stop_step})",
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
    add(
        "teacher-compile",
        "compile the teacher with torch.compile; no effect on a CPU (default: no)",
        action="store_true",
    )
    add(
        "placement",
        "where in the pipeline the teacher runs; no effect on the numbers"
        f" (default: {default.placement})",
        choices=PLACEMENTS,
    )
    add(
        "max-prefetch",
        "microbatches whose teacher states the stage of layer k may hold before their backward"
        " (default: those of a global batch)",
        type=int,
    )
    add(
        "cross-tokenizer",
        "the teacher has another tokenizer and reads the same text under its own (default: no)",
        action=argparse.BooleanOptionalAction,
    )
    add("kd-weight", f"w of rkd and salt, from 0 to 1 (default: {default.kd_weight})", type=float)
    add(
        "kd-temperature",
        f"divides the teacher's logits in rkd and salt (default: {default.kd_temperature})",
        type=float,
    )
    add("kd-top-k", "keep so many of the teacher's entries a token (default: 0, all)", type=int)
    add(
        "kd-fade",
        "let w of salt fall linearly to 0 at the stop step (default: no)",
        action=argparse.BooleanOptionalAction,
    )
    group.add_argument(
        "--let-metrics-path", type=Path, default=None, help="JSON lines file, one a step"
    )
    group.add_argument(
        "--let-guard",
        action="store_true",
        help="warn when the alignment seems to do harm: cosine falling, held-out loss rising",
    )
    group.add_argument(
        "--let-guard-baseline",
        type=Path,
        metavar="FILE",
        help="metrics of a run without a teacher, which --let-guard compares the loss with",
    )
    _add_engine_arguments(parser)
    return parser


class _LayerPair(argparse.Action):
    """Stands for `--let-layer` and `--let-teacher-layer`."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        namespace.let_layer, namespace.let_teacher_layer = LAYER_PAIRS[value]


def _layer(text: str) -> int | str:
    if text in ("middle", "last"):
        return text
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no layer; give middle, last or a number from 1"
        ) from error


def _layer_number(layer: int | str, args: argparse.Namespace) -> int:
    """1-based number of the student's layer."""
    if layer == "last":
        return int(args.num_layers)
    return max(1, int(args.num_layers) // 2) if layer == "middle" else int(layer)


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
    if args.let_teacher_shard and args.let_method not in (None, "none", "let"):
        raise LETError(
            f"--let-teacher-shard cannot be used with --let-method {args.let_method}, which needs"
            " the teacher's output layer on every rank; drop it."
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
    if "layer" in given:
        given["layer"] = _layer_number(given["layer"], args)
    config = LETConfig(**given)
    useless = sorted(given.keys() - _USED[config.method])
    if useless:
        flags = ", ".join("--let-" + name.replace("_", "-") for name in useless)
        warnings.warn(f"{flags} has no effect with --let-method {config.method}.", stacklevel=1)
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


def loaded_checkpoint(args: argparse.Namespace) -> Path | None:
    """Folder of the checkpoint that the set-up has loaded to go on from; None in a new run."""
    if args.load is None or args.finetune or not args.iteration:
        return None
    return Path(args.load) / f"iter_{args.iteration:07d}"


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


# The same for a learned projection.
_REFUSED_WITH_PROJECTION: tuple[tuple[str, Any, str], ...] = (
    ("optimizer", "adam", "its linear layer is trained by Adam; give --optimizer adam"),
    (
        "optimizer_cuda_graph",
        False,
        "its update is in the optimizer's step; drop --optimizer-cuda-graph",
    ),
    (
        "ckpt_format",
        "torch_dist",
        "only such checkpoints hold what is not the model's own; give --ckpt-format torch_dist",
    ),
    (
        "ckpt_assume_constant_structure",
        False,
        "it leaves the checkpoints at --let-stop-step; drop --ckpt-assume-constant-structure",
    ),
    (
        "non_persistent_save_interval",
        None,
        "it is not read from such checkpoints; drop --non-persistent-save-interval",
    ),
)


# The same for the methods that learn from the teacher's logits.
_REFUSED_WITH_LOGITS: tuple[tuple[str, Any, str], ...] = (
    ("mtp_num_layers", None, "the teacher predicts one token ahead; drop --mtp-num-layers"),
)


def check_supported(args: argparse.Namespace) -> None:
    """Refuse Megatron flags under which the teacher would be bypassed or wrong.

    Raises:
        LETError: names the flag and what to do.
    """
    method = f"--let-method {args.let_method}"
    _refuse(args, _REFUSED, method)
    if args.let_method != "let":
        _refuse(args, _REFUSED_WITH_LOGITS, method)
    elif getattr(args, "let_projection", None) == "learned":
        _refuse(args, _REFUSED_WITH_PROJECTION, "--let-projection learned")


def _refuse(
    args: argparse.Namespace, rows: tuple[tuple[str, Any, str], ...], with_what: str
) -> None:
    for name, allowed, reason in rows:
        value = getattr(args, name, allowed)
        if value not in (allowed, None):
            flag = _FLAG_NAMES.get(name, "--" + name.replace("_", "-"))
            raise LETError(f"{with_what} cannot be used with {flag} {value}: {reason}.")


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
    if config.method == "let":
        _check_layers(config, folder, args)
    # With a tokenizer of its own the teacher reads as much as it can.
    limit = None if config.cross_tokenizer else folder.max_positions
    if limit is not None and args.seq_length > limit:
        raise LETError(
            f"--seq-length is {args.seq_length} but the teacher was built for "
            f"{folder.max_positions} positions; shorten the sequence or use another teacher."
        )
    steps = num_steps(args)
    if config.stop_step > steps and config.method != "rkd":
        warnings.warn(
            f"--let-stop-step {config.stop_step} is beyond the run's {steps} steps:"
            " the weight never reaches 0 and the teacher stays to the end.",
            stacklevel=2,
        )


def num_steps(args: argparse.Namespace) -> int:
    """Training steps of the run."""
    if args.train_iters is not None:
        return int(args.train_iters)
    return int(args.train_samples // args.global_batch_size)


def _check_layers(config: LETConfig, folder: TeacherFolder, args: argparse.Namespace) -> None:
    if config.layer > args.num_layers:
        raise LETError(
            f"--let-layer is {config.layer} but the student has {args.num_layers} layers; give a"
            f" number from 1 to {args.num_layers}."
        )
    tapped_layer(config.teacher_layer, folder.num_layers)
    tokens = args.micro_batch_size * args.seq_length
    needed = TOKENS_PER_FEATURE * folder.hidden_size
    if config.loss == "cca" and tokens < needed:
        raise LETError(
            f"--let-loss cca correlates the {folder.hidden_size} features of the teacher over the"
            f" {tokens} tokens of a microbatch, which chance alone would; raise --micro-batch-size"
            f" to at least {-(-needed // args.seq_length)}, or use another --let-loss."
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
