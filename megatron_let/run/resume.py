"""Step and checkpoint that a run resumes from."""

import argparse
from pathlib import Path

from megatron_let.errors import LETError
from megatron_let.files.names import TRACKER, checkpoint_name


def resumed_step(args: argparse.Namespace) -> int:
    """Return the 0-based first step of the run, from `--load`'s tracker file; 0 for a new run."""
    if args.load is None or args.finetune:
        return 0
    if args.ckpt_step is not None:
        return int(args.ckpt_step)
    tracker = Path(args.load) / TRACKER
    content = tracker.read_text().strip() if tracker.is_file() else ""
    return int(content) if content.isdecimal() else 0


def check_loads_something(args: argparse.Namespace) -> None:
    """Raise a LETError if `--load`, unless it is where the run itself saves, has no checkpoint.

    Without one Megatron trains from random weights.
    """
    if args.load is None or args.non_persistent_ckpt_type or args.pretrained_checkpoint:
        return
    own = args.save is not None and Path(args.load).resolve() == Path(args.save).resolve()
    if (args.finetune or not own) and not (Path(args.load) / TRACKER).is_file():
        raise LETError(
            f"--load {args.load} has no checkpoint, because it lacks {TRACKER}; give the folder of"
            " a run's checkpoints, or drop it to start from random weights."
        )


def loaded_checkpoint(args: argparse.Namespace) -> Path | None:
    """Return the folder of the checkpoint that Megatron resumed from; None for a new run.

    Call it after Megatron's set-up, which sets `args.iteration`.
    """
    if args.load is None or args.finetune or not args.iteration:
        return None
    return Path(args.load) / checkpoint_name(args.iteration)
