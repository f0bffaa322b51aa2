"""Checkpoints as wandb artifacts, when the last asynchronous save ends after wandb has finished."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

from megatron.training.global_vars import get_wandb_writer

_TARGET = "megatron.training.wandb_utils:on_save_checkpoint_success"


def wrappers(args: argparse.Namespace) -> dict[str, Callable[..., Callable[..., None]]]:
    """Return {patch target: wrapper}, only of a run with wandb and asynchronous saves."""
    return {_TARGET: while_wandb_runs} if args.wandb_project and args.async_save else {}


def while_wandb_runs(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `on_save_checkpoint_success`: log no artifact once wandb has finished."""

    @functools.wraps(original)
    def on_save_checkpoint_success(*args: Any) -> None:
        wandb = get_wandb_writer()
        if wandb and wandb.run is not None:
            original(*args)

    return on_save_checkpoint_success
