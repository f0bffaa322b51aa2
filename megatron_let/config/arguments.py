"""The `--let-*` flags and the LETConfig that they give."""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from typing import Any

from megatron_let.config.hybrid_pattern import pattern_layers
from megatron_let.config.let_config import (
    METHODS,
    PLACEMENTS,
    PROJECTIONS,
    LETConfig,
)
from megatron_let.losses import LOSSES

ENGINES = ("megatron", "deepspeed")


def flag(name: str) -> str:
    """Return the flag of an argument, such as `--seq-length` of `seq_length`."""
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `--let-*` flags and return the parser; Megatron's `extra_args_provider`."""
    group = parser.add_argument_group("Late-to-Early Training (LET)")

    def add(name: str, help_text: str, default: str | None = None, **options: Any) -> None:
        shown = default or getattr(LETConfig(), name.replace("-", "_"))
        # None marks a flag that was not given, so that an unused one can be reported.
        group.add_argument(
            f"--let-{name}", default=None, help=f"{help_text} (default: {shown})", **options
        )

    add("method", "training method", choices=tuple(METHODS))
    add("teacher", "the small trained model: a folder, a .gguf file or a hub id", type=Path)
    add("layer", "k, the student's layer: middle, last or a number from 1", type=_layer)
    add("loss", "loss between the student's and the teacher's states", choices=LOSSES)
    add(
        "projection",
        "map from the student's to the teacher's width: interpolation, or a linear layer that is"
        " trained with the student",
        choices=PROJECTIONS,
    )
    add("weight", "lambda_0, weight at the first step", type=float)
    add("stop-step", "S_stop, step at which the teacher is freed", type=int)
    add("teacher-layer", "last, middle or a number from 1")
    add(
        "teacher-final-norm",
        "apply the teacher's final norm to its last layer",
        "yes",
        action=argparse.BooleanOptionalAction,
    )
    add(
        "teacher-dtype",
        "precision of the teacher; auto takes bf16 where the machine computes it natively",
        "auto",
        choices=("auto", "bf16", "fp32"),
    )
    add(
        "teacher-compile",
        "compile the teacher with torch.compile; no effect on a CPU",
        "yes, if it is not sharded",
        action=argparse.BooleanOptionalAction,
    )
    add(
        "placement",
        "where in the pipeline the teacher runs; does not change the numbers",
        choices=PLACEMENTS,
    )
    add(
        "max-prefetch",
        "microbatches whose teacher states the stage of layer k may hold before their backward",
        "those of a global batch",
        type=int,
    )
    add(
        "cross-tokenizer",
        "the teacher reads the same text under its own tokenizer",
        "no",
        action=argparse.BooleanOptionalAction,
    )
    add("kd-weight", "w of rkd and salt, from 0 to 1", type=float)
    add("kd-temperature", "divides the teacher's logits in rkd and salt", type=float)
    add("kd-top-k", "number of the teacher's logits to keep per token; 0 keeps all", type=int)
    group.add_argument("--let-metrics-path", type=Path, help="JSON lines file, one line per step")
    group.add_argument(
        "--let-guard",
        action="store_true",
        help="warn when the teacher appears to hurt the student: falling cosine, rising held-out"
        " loss",
    )
    group.add_argument(
        "--let-guard-baseline",
        type=Path,
        metavar="FILE",
        help="metrics of a run without a teacher, which --let-guard compares the loss with",
    )
    _add_engine_arguments(parser)
    return parser


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine",
        choices=ENGINES,
        default="megatron",
        help="training engine (default: megatron)",
    )
    group.add_argument("--deepspeed-config", type=Path, help="DeepSpeed's JSON config")
    group.add_argument(
        "--let-teacher-shard",
        action="store_true",
        help="shard the teacher over the replicas by ZeRO-3 (--engine deepspeed)",
    )


def _layer(text: str) -> int | str:
    if text in ("middle", "last"):
        return text
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a layer; give middle, last or a number from 1"
        ) from error


def num_student_layers(args: argparse.Namespace) -> int:
    """Return the number of the student's layers; `--num-layers` counts a HybridModel's entries."""
    pattern = getattr(args, "hybrid_layer_pattern", None)
    return int(args.num_layers) if pattern is None else len(pattern_layers(pattern))


def layer_number(args: argparse.Namespace) -> int:
    """Return the 1-based number of the student's aligned layer."""
    layer = LETConfig.layer if args.let_layer is None else args.let_layer
    if layer == "last":
        return num_student_layers(args)
    return max(1, num_student_layers(args) // 2) if layer == "middle" else int(layer)


def let_config_from_args(args: argparse.Namespace) -> LETConfig:
    """Build the config from parsed arguments; warn of flags that the method does not read.

    Raises:
        LETError: a value is out of range.
    """
    flags = {name: getattr(args, f"let_{name}", None) for name in LETConfig.__dataclass_fields__}
    given = {name: value for name, value in flags.items() if value is not None}
    if "layer" in given:
        given["layer"] = layer_number(args)
    config = LETConfig(**given)
    unused = sorted(given.keys() - config.traits.uses - {"method"})
    if unused:
        names = ", ".join(flag(f"let_{name}") for name in unused)
        warnings.warn(f"{names} has no effect with --let-method {config.method}.", stacklevel=1)
    return config


def num_steps(args: argparse.Namespace) -> int:
    """Return the number of training steps of the run."""
    if args.train_iters is not None:
        return int(args.train_iters)
    return int(args.train_samples // args.global_batch_size)


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel: int) -> int:
    """Return Megatron's rows of the embedding: the next multiple of divisible_by x TP."""
    multiple = divisible_by * tensor_parallel
    return math.ceil(vocab_size / multiple) * multiple
