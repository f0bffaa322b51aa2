"""Files in the checkpoint folder that control a run; rank 0 looks for them after each step.

`STOP` saves a checkpoint and ends the run; it stays, so that no launcher restarts the run.
`SAVE_NOW` saves a checkpoint and is removed; the run continues. The run itself writes `DONE` after
its last step is saved.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.training import print_rank_0, training

from megatron_let.files.names import DONE, SAVE_NOW, STOP

# Ranks exchange a request as its index here; 0 is no request. STOP has precedence.
_REQUESTS = (None, STOP, SAVE_NOW)

_TARGET = "megatron.training.training:checkpoint_and_decide_exit"


def wrappers(args: argparse.Namespace) -> dict[str, Callable[..., Callable[..., bool]]]:
    """Return {patch target: wrapper} that obeys the control files of `--save`; empty without it."""
    if args.save is None:
        return {}
    control = ControlFiles(Path(args.save), args.save_interval)
    return {_TARGET: control.wrap_checkpoint_and_decide_exit}


def mark_done(args: argparse.Namespace) -> None:
    """Write `DONE`, unless the run only evaluated; call it on one rank, after the last save."""
    if args.save is not None and not args.skip_train:
        (Path(args.save) / DONE).write_text(f"{args.train_iters}\n")


class ControlFiles:
    """Looks for the control files on rank 0 and broadcasts what it finds."""

    def __init__(self, folder: Path, save_interval: int | None) -> None:
        # The interval is that of Megatron's own saves, in iterations; None for never.
        self._folder, self._save_interval = folder, save_interval

    def wrap_checkpoint_and_decide_exit(self, original: Callable[..., bool]) -> Callable[..., bool]:
        """Wrap `checkpoint_and_decide_exit`: obey the control files after it."""

        @functools.wraps(original)
        def checkpoint_and_decide_exit(*args: Any) -> bool:
            model, optimizer, scheduler, iteration, num_flops, context, data = args
            if original(*args):
                return True
            request = self._request()
            if request is None:
                return False
            print_rank_0(f"megatron_let: {self._folder / request} at iteration {iteration}")
            if not self._was_saved(iteration):
                state = (model, optimizer, scheduler, num_flops, context)
                training.save_checkpoint_and_time(iteration, *state, train_data_iterator=data)
            if request == SAVE_NOW and torch.distributed.get_rank() == 0:
                (self._folder / SAVE_NOW).unlink(missing_ok=True)
            return request == STOP

        return checkpoint_and_decide_exit

    def _was_saved(self, iteration: int) -> bool:
        return self._save_interval is not None and iteration % self._save_interval == 0

    def _request(self) -> str | None:
        """Return the request that rank 0 finds; all ranks get the same one in the same step."""
        found = 0
        if torch.distributed.get_rank() == 0:
            files = (name is not None and (self._folder / name).exists() for name in _REQUESTS)
            found = next((number for number, there in enumerate(files) if there), 0)
        message = torch.tensor([found], dtype=torch.int32, device="cuda")
        torch.distributed.broadcast(message, src=0)
        return _REQUESTS[int(message.item())]
