"""Megatron's old `torch` format, one pickle per rank; read only from a trusted author."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_let.errors import LETError, first_line


def is_legacy(folder: Path) -> bool:
    """Return whether a folder is a checkpoint in the old format."""
    return bool(_files(folder))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("mp_rank_*/*.pt"))


class LegacyCheckpoint:
    """A checkpoint of one rank, held in memory. Opening it can run code in its pickle.

    Attributes:
        folder: folder of the checkpoint.
        state: arguments, counters and everything else that is not a tensor.

    Raises:
        LETError: saved by more than one rank, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        files = _files(folder)
        if len(files) != 1:
            raise LETError(
                f"The checkpoint {folder} is split over {len(files)} ranks in the old format;"
                " convert it first with Megatron: --load it with its layout and"
                " --ckpt-convert-format torch_dist."
            )
        try:
            state = torch.load(files[0], map_location="cpu", weights_only=False)
        except Exception as error:  # a damaged pickle can raise any exception
            raise LETError(f"{files[0]} cannot be read ({first_line(error)}).") from error
        if not isinstance(state, dict) or "model" not in state:
            raise LETError(f"{files[0]} has no model.")
        self.folder = folder
        self.state: Mapping[str, Any] = state
        self._tensors = dict(_flat(state["model"]))

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors by name."""
        return self._tensors

    def entries(self) -> list[str]:
        """Return the names of the tensors."""
        return list(self._tensors)

    def facts(self) -> dict[str, Any]:
        """Return what `inspect` prints about this format."""
        return {"engine": "megatron, old format"}

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        """Return one tensor, or one layer of it."""
        return self._tensors[name] if layer is None else self._tensors[name][layer]


def _flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
