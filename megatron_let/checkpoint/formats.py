"""The formats of Megatron checkpoints: detection and opening.

This is the only place that names the DeepSpeed engine's reader. A folder that matches no format
may be a Hugging Face folder, which `weights.open_weights` opens.
"""

from __future__ import annotations

from pathlib import Path

from megatron_let.checkpoint.torch_dist import TorchDist, has_index, is_torch_dist
from megatron_let.engines.deepspeed.checkpoint_reader import ZeroCheckpoint, is_zero_checkpoint
from megatron_let.errors import LETError
from megatron_let.files.names import TRACKER, checkpoint_name

# A checkpoint with tensors under Megatron's names.
Checkpoint = TorchDist | ZeroCheckpoint


def is_legacy(folder: Path) -> bool:
    """Return whether a folder is in Megatron's old `torch` format, one pickle per rank."""
    return any(folder.glob("mp_rank_*/*.pt"))


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder looks like a checkpoint of some format, complete or not."""
    return is_zero_checkpoint(folder) or is_legacy(folder) or is_torch_dist(folder)


def is_complete(folder: Path) -> bool:
    """Return whether a folder is a checkpoint that can be opened and was saved to the end."""
    # The DeepSpeed engine renames a folder to its final name once it is complete.
    return is_zero_checkpoint(folder) or has_index(folder)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open an `iter_*` folder of either engine; reads no tensor.

    Raises:
        LETError: not a checkpoint, not complete, or in Megatron's old format.
    """
    if is_zero_checkpoint(folder):
        return ZeroCheckpoint(folder)
    if is_legacy(folder):
        raise LETError(
            f"The checkpoint {folder} is in Megatron's old format, pickles that can run code when"
            " they are opened; if you trust its author, let Megatron convert it: --load it in its"
            " layout with --ckpt-convert-format torch_dist --ckpt-convert-save DIR."
        )
    if is_torch_dist(folder):
        return TorchDist(folder)
    raise LETError(
        f"The folder {folder} is not a Megatron checkpoint; give a run's checkpoint folder or one"
        " of its iter_* folders."
    )


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
