"""The formats of Megatron checkpoints: detection and opening.

This is the only place that names the DeepSpeed engine's reader. A folder that matches no format
may be a Hugging Face folder, which `weights.open_weights` opens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_let.checkpoint.torch_dist import TorchDist, has_index, is_torch_dist
from megatron_let.engines.deepspeed.checkpoint_reader import ZeroCheckpoint, is_zero_checkpoint
from megatron_let.errors import LETError
from megatron_let.files.names import TRACKER, checkpoint_name


class Checkpoint(Protocol):
    """A checkpoint with tensors under Megatron's names; layers of one name may be stacked.

    Attributes:
        folder: folder of the checkpoint.
        state: arguments, counters and everything else that is not a tensor.
    """

    folder: Path

    @property
    def state(self) -> Mapping[str, Any]: ...

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Return name -> a tensor of the same shape and type, which may be without values."""
        ...

    def entries(self) -> list[str]:
        """Return the names of everything saved, without the optimizer."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what `inspect` prints about this format."""
        ...

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        """Read one tensor, or one layer of it."""
        ...


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    Attributes:
        matches: whether a folder looks like the format, complete or not.
        open: opens a folder; raises `LETError` if it is not complete.
        is_complete: whether such a folder has been saved to the end.
    """

    matches: Callable[[Path], bool]
    open: Callable[[Path], Checkpoint]
    is_complete: Callable[[Path], bool]


def is_legacy(folder: Path) -> bool:
    """Return whether a folder is in Megatron's old `torch` format, one pickle per rank."""
    return any(folder.glob("mp_rank_*/*.pt"))


def _refuse_legacy(folder: Path) -> Checkpoint:
    raise LETError(
        f"The checkpoint {folder} is in Megatron's old format, pickles that can run code when they"
        " are opened; if you trust its author, let Megatron convert it: --load it in its layout"
        " with --ckpt-convert-format torch_dist --ckpt-convert-save DIR."
    )


# In the order of detection.
FORMATS = (
    # The engine renames a folder to its final name once it is complete.
    Format(is_zero_checkpoint, ZeroCheckpoint, is_zero_checkpoint),
    Format(is_legacy, _refuse_legacy, lambda folder: False),
    Format(is_torch_dist, TorchDist, has_index),
)


def find_format(folder: Path) -> Format | None:
    """Return the format of a checkpoint folder; None if it is of no known format."""
    return next((found for found in FORMATS if found.matches(folder)), None)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open an `iter_*` folder of either engine; reads no tensor.

    Raises:
        LETError: not a checkpoint, not complete, or in Megatron's old format.
    """
    found = find_format(folder)
    if found is None:
        raise LETError(
            f"The folder {folder} is not a Megatron checkpoint; give a run's checkpoint folder or"
            " one of its iter_* folders."
        )
    return found.open(folder)


def iteration_folder(path: Path) -> Path:
    """Return the last checkpoint in a run's checkpoint folder, or `path` if it is a checkpoint.

    Raises:
        LETError: the folder, or the checkpoint that its tracker names, does not exist.
    """
    if not path.is_dir():
        raise LETError(f"The checkpoint {path} does not exist.")
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    content = tracker.read_text().strip()
    name = checkpoint_name(int(content)) if content.isdecimal() else content
    if not (path / name).is_dir():
        raise LETError(f"{tracker} names {content!r}, but {path / name} does not exist.")
    return path / name
