"""End a run without `--save` with a message when Megatron rejects the result of a step."""

import argparse
from collections.abc import Callable
from typing import Any

from megatron.training import print_rank_0

_TARGET = "megatron.training.training:save_checkpoint_and_time"


def wrappers(args: argparse.Namespace) -> dict[str, Callable[..., Callable[..., None]]]:
    """Return {patch target: wrapper} that saves nothing; empty with `--save`."""
    return {} if args.save is not None else {_TARGET: _report_instead}


def _report_instead(original: Callable[..., None]) -> Callable[..., None]:
    def save_checkpoint_and_time(iteration: int, *args: Any, **kwargs: Any) -> None:
        print_rank_0(
            f"megatron_let: the run ends after {iteration} steps, because the next one's result was"
            " rejected (see the lines above); nothing is saved without --save"
        )

    return save_checkpoint_and_time
