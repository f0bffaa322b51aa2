"""LETError, a one-sentence error message for the user, and its output."""

from __future__ import annotations

import os
import sys


class LETError(ValueError):
    """A request that cannot be carried out; the message is one sentence for the user.

    Attributes:
        collective: every rank raises it, so one of them prints it.
    """

    def __init__(self, message: str, collective: bool = False) -> None:
        super().__init__(message)
        self.collective = collective


def first_line(error: BaseException) -> str:
    """Return the first line of another package's message, to quote it in one of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def print_error(error: LETError) -> None:
    """Print an error of a training run to stderr, on the ranks that have to report it.

    During start-up every rank raises the same error and one rank per node prints it. Once
    torch.distributed is initialized each rank that fails prints, except that rank 0 alone prints a
    collective error.
    """
    import torch

    rank = int(os.environ.get("RANK", "0"))
    if torch.distributed.is_initialized():
        prints = rank == 0 or not error.collective
    else:
        prints = os.environ.get("LOCAL_RANK", "0") == "0"
    if prints:
        print(f"megatron_let: error (rank {rank}): {error}", file=sys.stderr, flush=True)
