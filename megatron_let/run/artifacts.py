"""Checkpoints as wandb artifacts, when the last asynchronous save ends after wandb has finished."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

from megatron.training.global_vars import get_wandb_writer

_TARGET = "megatron.training.wandb_utils:on_save_checkpoint_success"


def wrappers(args: argparse.Namespace) -> dict[str, Callable[..., Callable[..., None]]]:
    """Return {patch target: wrapper}; empty unless the run logs to wandb and saves asynchronously.

    Args:
        args: result of Megatron's `parse_and_validate_args`.
    """
    return {_TARGET: while_wandb_runs} if args.wandb_project and args.async_save else {}


def while_wandb_runs(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `on_save_checkpoint_success`: log no artifact once wandb has finished."""

    @functools.wraps(original)
    def on_save_checkpoint_success(
        checkpoint_path: str, tracker_filename: str, save_dir: str, iteration: int
    ) -> None:
        wandb = get_wandb_writer()
        if wandb and wandb.run is not None:
            original(checkpoint_path, tracker_filename, save_dir, iteration)

    return on_save_checkpoint_success
