"""Convert Megatron checkpoints to Hugging Face folders and back, verify and inspect them.

It runs on the CPU and holds one tensor at a time. A checkpoint of any layout is given as a run's
folder, for the last one, or as an iter_* folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from megatron_let.cli.common import add_command, positive, run_command, say
from megatron_let.errors import LETError
from megatron_let.files.atomic import check_separate

if TYPE_CHECKING:
    from megatron_let.checkpoint.weights import Weights

DIFFERENT = 1
_NUM_SEQUENCES, _SEQ_LENGTH = 4, 128


def main(argv: list[str] | None = None) -> int:
    """Convert, verify or inspect; return 0, 1 if `verify` finds a difference, 2 on bad input."""
    given = _parser().parse_args(argv)
    # Set before torch is imported: nothing here uses a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return run_command("convert", lambda console: given.run(given, console))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=" ".join((__doc__ or "").split()))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_export(commands)
    _add_import(commands)
    _add_verify(commands)
    _add_inspect(commands)
    return parser


def _add_conversion_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="DIR", help="checkpoint or model folder")
    add("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--force", action="store_true", help="replace the output if it exists")
    add("--tokenizer", type=Path, help="folder or .model file (default: the input's)")
    add(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="type of the weights (default: the input's)",
    )


def _add_export(commands: Any) -> None:
    text = "convert a run's checkpoint to a Hugging Face folder"
    parser = add_command(commands, "megatron-to-hf", _export, text)
    _add_conversion_flags(parser)
    add = parser.add_argument
    add("--max-shard-size", type=_size, default="5GB", help="size of a weight file (default: 5GB)")


def _add_import(commands: Any) -> None:
    text = "convert a Hugging Face folder to a checkpoint for --load"
    parser = add_command(commands, "hf-to-megatron", _import, text)
    _add_conversion_flags(parser)
    add = parser.add_argument
    add("--tensor-model-parallel-size", type=positive, default=1, metavar="TP",
        help="planned layout: checked, and the vocabulary padded for it (default: 1)")  # fmt: skip
    add("--pipeline-model-parallel-size", type=positive, default=1, metavar="PP",
        help="planned layout: checked (default: 1)")  # fmt: skip
    add("--make-vocab-size-divisible-by", type=positive, default=128, metavar="N",
        help="as in training (default: 128)")  # fmt: skip


def _add_verify(commands: Any) -> None:
    text = "check that two folders hold the same model; each runs under its own library"
    add = add_command(commands, "verify", _verify, text).add_argument
    add("first", type=Path, metavar="A", help="Megatron checkpoint or Hugging Face folder")
    add("second", type=Path, metavar="B", help="Megatron checkpoint or Hugging Face folder")
    add("--tokenizer", type=Path, help="tokenizer of the checkpoints (default: theirs)")
    add("--data", type=Path, metavar="PREFIX", help="indexed data to run both models on")
    add("--num-sequences", type=positive, metavar="N", help=f"default: {_NUM_SEQUENCES}")
    add("--seq-length", type=positive, metavar="S", help=f"default: {_SEQ_LENGTH}")
    add(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference of fp32 logits, or of tensors with --weights-only (default: 1e-4)",
    )
    add("--weights-only", action="store_true", help="compare tensors without running the models")


def _add_inspect(commands: Any) -> None:
    add = add_command(commands, "inspect", _inspect, "show a checkpoint's contents").add_argument
    add("checkpoint", type=Path, metavar="DIR")
    add("--json", action="store_true", help="print JSON")


def _size(text: str) -> str:
    if not re.fullmatch(r"\d+[KMGT]B", text):
        raise ValueError
    return text


def _dtype(given: argparse.Namespace) -> Any:
    from megatron_let.checkpoint.convert import DTYPES

    return DTYPES[given.dtype] if given.dtype else None


def _open(given: argparse.Namespace) -> Weights:
    """Open `--input`, unless the output would replace a part of it or of `--tokenizer`."""
    from megatron_let.checkpoint.weights import open_weights

    # The weights have the folder of one iteration; --input may be the folder of a run.
    check_separate(given.output, given.input, given.tokenizer)
    return open_weights(given.input, given.tokenizer)


def _export(given: argparse.Namespace, console: Console) -> int:
    from megatron_let.checkpoint.convert import to_hugging_face_folder
    from megatron_let.checkpoint.weights import MegatronWeights

    weights = _open(given)
    to_hugging_face_folder(weights, given.output, _dtype(given), given.max_shard_size, given.force)
    say(console, f"{_describe(weights)} -> {given.output}")
    if isinstance(weights, MegatronWeights) and weights.ignored_rope_factor is not None:
        say(
            console,
            f"--rope-scaling-factor is {weights.ignored_rope_factor} in the checkpoint's arguments,"
            " and Megatron's own entry does not apply it: the exported factor is 8; change it in"
            " config.json if your script did apply it",
            "yellow",
        )
    if weights.tokenizer is None:
        say(console, "no tokenizer was found; add one with --tokenizer DIR", "yellow")
    return 0


def _import(given: argparse.Namespace, console: Console) -> int:
    from megatron_let.checkpoint.architecture import recipe_settings
    from megatron_let.checkpoint.convert import MegatronLayout, to_megatron_checkpoint

    weights = _open(given)
    layout = MegatronLayout(
        given.tensor_model_parallel_size,
        given.pipeline_model_parallel_size,
        given.make_vocab_size_divisible_by,
    )
    to_megatron_checkpoint(weights, given.output, _dtype(given), layout, given.force)
    say(console, f"{_describe(weights)} -> {given.output}")
    say(console, f"start from it with --load {given.output}; the recipe's model section is:")
    print(yaml.safe_dump({"model": recipe_settings(weights.architecture)}, sort_keys=False), end="")
    return 0


def _describe(weights: Weights) -> str:
    from megatron_let.checkpoint.model_types import model_type_of
    from megatron_let.checkpoint.parameter_mapping import num_parameters

    kind = model_type_of(weights.architecture).name
    dtype = str(weights.dtype).removeprefix("torch.")
    return (
        f"{weights.folder}: {kind}, {num_parameters(weights.architecture):,} parameters in {dtype}"
    )


def _check_verify(given: argparse.Namespace) -> None:
    """Check the flags of `verify`.

    Raises:
        LETError: a tolerance that no difference can be within, or a flag without effect.
    """
    if not 0 <= given.tolerance < math.inf:
        raise LETError(f"--tolerance is {given.tolerance}; give a finite number of at least 0.")
    if not given.weights_only:
        return
    for name in ("data", "num_sequences", "seq_length"):
        value = getattr(given, name)
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            raise LETError(
                f"{flag} is {value} and --weights-only runs no model on it; leave one of them out."
            )


def _verify(given: argparse.Namespace, console: Console) -> int:
    from megatron_let.checkpoint.verify import audit, compare_logits, sample_tokens
    from megatron_let.checkpoint.weights import open_weights

    _check_verify(given)
    first = open_weights(given.first, given.tokenizer)
    second = open_weights(given.second, given.tokenizer)
    tensors = audit(first, second)
    say(
        console,
        f"tensors: {tensors.num_tensors}, each used once; {tensors.num_bitwise} bitwise equal,"
        f" largest difference {tensors.largest_difference:.3g}",
    )
    if tensors.different:
        say(console, f"not equal: {', '.join(tensors.different[:5])}", "yellow")
    if tensors.unused:
        say(console, f"not part of the model: {', '.join(tensors.unused[:5])}", "yellow")
    close = tensors.largest_difference <= given.tolerance
    if not given.weights_only:
        count, length = given.num_sequences or _NUM_SEQUENCES, given.seq_length or _SEQ_LENGTH
        tokens = sample_tokens(first, count, length, given.data)
        found = compare_logits(first, second, tokens)
        say(
            console,
            f"logits on {found.num_tokens} tokens in fp32: largest difference"
            f" {found.largest_difference:.3g}, same top token at {found.top_token_agreement:.2%},"
            f" perplexity {found.perplexities[0]:.4f} and {found.perplexities[1]:.4f}",
        )
        close = found.largest_difference <= given.tolerance
    same = close and not tensors.unused
    say(console, "same model" if same else "NOT the same model", "green" if same else "red")
    return 0 if same else DIFFERENT


def _inspect(given: argparse.Namespace, console: Console) -> int:
    from megatron_let.checkpoint.describe import describe

    found = describe(given.checkpoint)
    if given.json:
        print(json.dumps(found, indent=2))
        return 0
    shapes = found.pop("tensors")
    foreign = found.pop("not_of_a_gpt_model")
    projection = found.pop("let_projection", None)
    for name, value in found.items():
        items = value.items() if isinstance(value, dict) else ()
        text = ", ".join(f"{k} {v}" for k, v in items) if items else _readable(value)
        print(f"{name.replace('_', ' ')}: {text or 'none'}")
    for name, shape in shapes.items():
        print(f"  {name}: {' x '.join(map(str, shape))}")
    if projection is not None:
        print(f"  let_projection: {' x '.join(map(str, projection))}, left out by megatron-to-hf")
    print(f"teacher: {'none' if not foreign else 'FOREIGN ENTRIES: ' + ', '.join(foreign)}")
    return 0


def _readable(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return ", ".join(value) if isinstance(value, list) else str(value)
