"""The `--let-*` flags, and the only place that reads Megatron's arguments for LET."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from megatron_let.config.let_config import (
    LAYER_PAIRS,
    METHODS,
    PLACEMENTS,
    PROJECTIONS,
    LETConfig,
)
from megatron_let.files.names import TRACKER, checkpoint_name
from megatron_let.losses import LOSSES

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
    tracker = Path(args.load) / TRACKER
    content = tracker.read_text().strip() if tracker.is_file() else ""
    return int(content) if content.isdecimal() else 0


def loaded_checkpoint(args: argparse.Namespace) -> Path | None:
    """Folder of the checkpoint that the set-up has loaded to go on from; None in a new run."""
    if args.load is None or args.finetune or not args.iteration:
        return None
    return Path(args.load) / checkpoint_name(args.iteration)


def num_steps(args: argparse.Namespace) -> int:
    """Training steps of the run."""
    if args.train_iters is not None:
        return int(args.train_iters)
    return int(args.train_samples // args.global_batch_size)
