"""LETError, a one-sentence error message for the user, and its output."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Everything that these functions of Megatron call happens once training has begun.
_TRAINING = ("train", "evaluate_and_print_results")
_TRAINING_LOOP = os.path.join("megatron", "training", "training.py")


# Subclasses of OSError and RuntimeError that a restart does not help.
_OF_SETTINGS = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    NotImplementedError,
    RecursionError,
)


class LETError(ValueError):
    """A request that cannot be carried out; the message is one sentence for the user.

    Attributes:
        collective: every rank raises it, so one of them prints it.
    """

    def __init__(self, message: str, collective: bool = False) -> None:
        super().__init__(message)
        self.collective = collective


def first_line(error: BaseException) -> str:
    """Return the first line of another package's message, to quote it in one of ours.

    An assertion without a message is quoted by its source.
    """
    lines = str(error).strip().splitlines()
    if not lines and isinstance(error, AssertionError) and error.__traceback__:
        lines = [traceback.extract_tb(error.__traceback__)[-1].line or ""]
    return next(filter(None, lines), type(error).__name__)


@contextlib.contextmanager
def raised_on_all_ranks(device: torch.device) -> Iterator[None]:
    """Raise a LETError of the block on every rank of the job, so that none waits for the others.

    Collective over the job. What else a block raises ends its rank, and with it the job.

    Args:
        device: training device.

    Raises:
        LETError: that of the first rank that raised one.
    """
    import torch

    error: LETError | None = None
    try:
        yield
    except LETError as raised:
        error = raised
    world = torch.distributed.get_world_size()
    first = torch.tensor(world if error is None else torch.distributed.get_rank(), device=device)
    torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
    source = int(first)
    if source == world:
        return
    message: list[str | None] = [None if error is None else str(error)]
    torch.distributed.broadcast_object_list(message, src=source)
    raise LETError(str(message[0]), collective=True) from error


def refusal_by_another_package(error: Exception) -> LETError | None:
    """Return what another package raised before the first step as one sentence.

    The traceback goes to a file that the sentence names, in `$OUTPUT`, the folder of the recipes'
    files, or else in the temporary folder.

    Returns:
        None once Megatron's training loop has begun, when the traceback matters.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if any(f.name in _TRAINING and f.filename.endswith(_TRAINING_LOOP) for f in frames):
        return None
    last = frames[-1]
    path = _write_traceback("".join(traceback.format_exception(error)))
    return LETError(
        f"The run cannot start: {first_line(error).rstrip('.')} ({type(error).__name__} in"
        f" {last.name}, {Path(last.filename).name}:{last.lineno}; the traceback is in {path})."
    )


def may_succeed_on_restart(error: Exception) -> bool:
    """Return whether an error is of a network, a device or a disk, and may not come again.

    torch raises RuntimeError for these. Megatron itself raises some for settings.
    """
    if isinstance(error, _OF_SETTINGS) or not isinstance(error, OSError | RuntimeError | EOFError):
        return False
    return not (isinstance(error, RuntimeError) and _is_raised_by_megatron(error))


def _is_raised_by_megatron(error: Exception) -> bool:
    """Return whether the error is of a `raise` in Megatron, and not of torch below it."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return False
    module = frames[-1][0].f_globals.get("__name__", "")
    statement = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return module.startswith("megatron.") and statement.startswith("raise")


def _write_traceback(text: str) -> Path:
    name = f"error-rank{os.environ.get('RANK', '0')}.log"
    for folder in (os.environ.get("OUTPUT") or tempfile.gettempdir(), tempfile.gettempdir()):
        with contextlib.suppress(OSError):
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return path
    # In the temporary folder another user may have a file of this name.
    handle, free = tempfile.mkstemp(suffix=f"-{name}")
    os.write(handle, text.encode())
    os.close(handle)
    return Path(free)


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
