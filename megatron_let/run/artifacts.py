"""Checkpoints as wandb's artifacts, where the last one is complete after wandb has finished."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

from megatron.training.global_vars import get_wandb_writer

from megatron_let.compat import PATCHES, PatchSet

_TARGET = "megatron.training.wandb_utils:on_save_checkpoint_success"


def enable(args: argparse.Namespace) -> PatchSet:
    """Let an asynchronous save be the last thing of a run that logs to wandb.

    Args:
        args: what Megatron's `parse_and_validate_args` returned.

    Returns:
        The applied patches; `undo()` takes them back.
    """
    patches = PatchSet()
    if args.wandb_project and args.async_save:
        patches.apply_all(PATCHES, {_TARGET: while_wandb_runs})
    return patches


def while_wandb_runs(original: Callable[..., None]) -> Callable[..., None]:
    """Stand in for `on_save_checkpoint_success`: log nothing once wandb has finished."""

    @functools.wraps(original)
    def on_save_checkpoint_success(
        checkpoint_path: str, tracker_filename: str, save_dir: str, iteration: int
    ) -> None:
        wandb = get_wandb_writer()
        if wandb and wandb.run is not None:
            original(checkpoint_path, tracker_filename, save_dir, iteration)

    return on_save_checkpoint_success
