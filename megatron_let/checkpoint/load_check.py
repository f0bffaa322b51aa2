"""Check a run's recipe against the checkpoint that it loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_let.checkpoint.architecture import first_difference, from_megatron
from megatron_let.checkpoint.formats import (
    is_checkpoint,
    is_legacy,
    iteration_folder,
    open_checkpoint,
)
from megatron_let.checkpoint.torch_dist import FORMAT, is_torch_dist
from megatron_let.errors import LETError
from megatron_let.files.names import TRACKER, checkpoint_name


def check_loaded(args: argparse.Namespace, tokenizer: Any) -> None:
    """Check that model flags match the loaded checkpoint.

    Megatron compares layers, width, heads and the shapes of most tensors; another RoPE base, norm
    epsilon or smaller vocabulary would silently change the model.

    Args:
        args: Megatron's arguments.
        tokenizer: Megatron's tokenizer.

    Raises:
        LETError: names the flag, its value and the checkpoint's; or the checkpoint is not complete.
    """
    folder = _folder_to_load(args)
    if folder is None:
        return
    saved = open_checkpoint(folder).state.get("args")
    if saved is None:
        return
    try:
        theirs = from_megatron(vars(saved), vocab_size=0)
        ours = from_megatron(vars(args), vocab_size=0)
    except LETError:
        return  # not a Llama: only Megatron's checks apply
    difference = first_difference(ours, theirs)
    if difference is not None:
        flag, ours_value, theirs_value = difference
        raise LETError(
            f"{flag} is {ours_value} in this run and {theirs_value} in the checkpoint {folder};"
            " use the checkpoint's value, or train without --load."
        )
    _check_vocabulary(saved, tokenizer, folder)


def _folder_to_load(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint that Megatron will load; None if there is none that can be checked."""
    if args.load is None or not (Path(args.load) / TRACKER).is_file():
        return None
    folder = iteration_folder(Path(args.load))
    if args.ckpt_step is not None:
        folder = Path(args.load) / checkpoint_name(args.ckpt_step)
    # Only dist_checkpointing writes FORMAT; torch_dcp has an index of the same name.
    is_other = is_torch_dist(folder) and not (folder / FORMAT).is_file()
    can_check = is_checkpoint(folder) and not is_legacy(folder) and not is_other
    return folder if can_check else None


def _check_vocabulary(saved: argparse.Namespace, tokenizer: Any, folder: Path) -> None:
    # With a real tokenizer the size is the tokenizer's, and --vocab-size is ignored.
    is_null = getattr(saved, "tokenizer_type", None) in (None, "NullTokenizer")
    known = getattr(saved, "vocab_size" if is_null else "padded_vocab_size", None)
    if known is not None and tokenizer.vocab_size > known:
        raise LETError(
            f"The run's tokenizer has {tokenizer.vocab_size} tokens and the checkpoint {folder}"
            f" {known}; use the checkpoint's --tokenizer-model."
        )
