"""The check of a run's recipe against the checkpoint that it starts from."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_let.checkpoint.architecture import first_difference, from_megatron
from megatron_let.checkpoint.torch_dist import FORMAT, TorchDist, iteration_folder
from megatron_let.engines.deepspeed.export import is_zero_checkpoint, read_state
from megatron_let.errors import LETError
from megatron_let.files.names import TRACKER, checkpoint_name


def check_loaded(args: argparse.Namespace, tokenizer: Any) -> None:
    """Check that `--load`'s weights would be used as the model that they were trained as.

    Megatron compares layers, width and heads, and the shapes of most tensors; RoPE's base, the
    norm's epsilon or a smaller vocabulary would change the model without a word.

    Args:
        args: Megatron's arguments.
        tokenizer: Megatron's tokenizer.

    Raises:
        LETError: names the flag, its value and the checkpoint's; or the checkpoint is not whole.
    """
    folder = _folder_to_load(args)
    if folder is None:
        return
    read = read_state if is_zero_checkpoint(folder) else _read_torch_dist
    saved = read(folder).get("args")
    if saved is None:
        return
    try:
        theirs = from_megatron(vars(saved), vocab_size=0)
        ours = from_megatron(vars(args), vocab_size=0)
    except LETError:
        return  # not a Llama: Megatron's own checks have to do
    difference = first_difference(ours, theirs)
    if difference is not None:
        flag, ours_value, theirs_value = difference
        raise LETError(
            f"{flag} is {ours_value} in this run and {theirs_value} in the checkpoint {folder};"
            " give the checkpoint's, or train without --load."
        )
    _check_vocabulary(saved, tokenizer, folder)


def _read_torch_dist(folder: Path) -> Mapping[str, Any]:
    return TorchDist(folder).common_state()


def _folder_to_load(args: argparse.Namespace) -> Path | None:
    """The checkpoint that Megatron will load; None where there is none, or of another format."""
    if args.load is None or not (Path(args.load) / TRACKER).is_file():
        return None
    folder = iteration_folder(Path(args.load))
    if args.ckpt_step is not None:
        folder = Path(args.load) / checkpoint_name(args.ckpt_step)
    known = (folder / FORMAT).is_file() or is_zero_checkpoint(folder)
    return folder if known else None


def _check_vocabulary(saved: argparse.Namespace, tokenizer: Any, folder: Path) -> None:
    # Beside a tokenizer of its own size a recipe's --vocab-size says nothing.
    of_null = getattr(saved, "tokenizer_type", None) in (None, "NullTokenizer")
    known = getattr(saved, "vocab_size" if of_null else "padded_vocab_size", None)
    if known is not None and tokenizer.vocab_size > known:
        raise LETError(
            f"The run's tokenizer has {tokenizer.vocab_size} tokens and the checkpoint {folder}"
            f" {known}; give the checkpoint's --tokenizer-model."
        )
