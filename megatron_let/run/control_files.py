"""Files in the checkpoint folder by which an operator steers a run, looked at after each step.

`STOP` saves a checkpoint and ends the run, and stays, so that no launcher starts it again.
`SAVE_NOW` saves a checkpoint, is removed, and the run goes on. `DONE` is the run's own mark that
its last step is taken and saved.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.training import print_rank_0, training

from megatron_let.compat import PATCHES, PatchSet
from megatron_let.files.names import DONE, SAVE_NOW, STOP

# A request's number among the ranks is its place here; 0 is no request. STOP comes first.
_REQUESTS = (None, STOP, SAVE_NOW)

_TARGET = "megatron.training.training:checkpoint_and_decide_exit"


def enable(args: argparse.Namespace) -> PatchSet:
    """Look at the control files of `--save` from now on; without `--save` there is nothing to do.

    Args:
        args: what Megatron's `parse_and_validate_args` returned.

    Returns:
        The applied patches; `undo()` takes them back.

    Raises:
        PatchError: Megatron is not the version that the patch was made for.
    """
    patches = PatchSet()
    if args.save is not None:
        control = ControlFiles(Path(args.save), args.save_interval)
        patches.apply_all(PATCHES, {_TARGET: control.wrap_checkpoint_and_decide_exit})
    return patches


def mark_done(args: argparse.Namespace) -> None:
    """Say that training has come to its end; call it on one rank, after the last save."""
    if args.save is not None:
        (Path(args.save) / DONE).write_text(f"{args.train_iters}\n")


class ControlFiles:
    """Looks for the control files on rank 0 and tells all ranks.

    Args:
        folder: where checkpoints are saved.
        save_interval: iterations at which Megatron saves by itself; None for never.
    """

    def __init__(self, folder: Path, save_interval: int | None) -> None:
        self._folder = folder
        self._save_interval = save_interval

    def wrap_checkpoint_and_decide_exit(self, original: Callable[..., bool]) -> Callable[..., bool]:
        """Stand in for `checkpoint_and_decide_exit`: after it, do what a file asks for."""

        @functools.wraps(original)
        def checkpoint_and_decide_exit(
            model: Any,
            optimizer: Any,
            opt_param_scheduler: Any,
            iteration: int,
            num_floating_point_operations_so_far: float,
            checkpointing_context: Any,
            train_data_iterator: Any,
        ) -> bool:
            state = (model, optimizer, opt_param_scheduler)
            rest = (num_floating_point_operations_so_far, checkpointing_context)
            if original(*state, iteration, *rest, train_data_iterator):
                return True
            request = self._request()
            if request is None:
                return False
            print_rank_0(f"megatron_let: {self._folder / request} at iteration {iteration}")
            if not self._was_saved(iteration):
                training.save_checkpoint_and_time(
                    iteration, *state, *rest, train_data_iterator=train_data_iterator
                )
            if request == SAVE_NOW and torch.distributed.get_rank() == 0:
                (self._folder / SAVE_NOW).unlink(missing_ok=True)
            return request == STOP

        return checkpoint_and_decide_exit

    def _was_saved(self, iteration: int) -> bool:
        return self._save_interval is not None and iteration % self._save_interval == 0

    def _request(self) -> str | None:
        """What rank 0 finds; all ranks hear the same, in the same step."""
        found = 0
        if torch.distributed.get_rank() == 0:
            files = (name is not None and (self._folder / name).exists() for name in _REQUESTS)
            found = next((number for number, there in enumerate(files) if there), 0)
        message = torch.tensor([found], dtype=torch.int32, device="cuda")
        torch.distributed.broadcast(message, src=0)
        return _REQUESTS[int(message.item())]
