"""Megatron's old `torch` format, one pickle a rank; read only for who trusts its author."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_let.checkpoint.torch_dist import legacy_files
from megatron_let.errors import LETError, first_line


class LegacyTensors:
    """Tensors of a one-rank checkpoint, held in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def tensors(self) -> Mapping[str, Any]:
        """Name -> size and type."""
        return {
            name: SimpleNamespace(size=t.size(), properties=SimpleNamespace(dtype=t.dtype))
            for name, t in self._tensors.items()
        }

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        """One tensor, or one layer of it."""
        return self._tensors[name] if layer is None else self._tensors[name][layer]


def read_legacy(folder: Path) -> tuple[LegacyTensors, Mapping[str, Any]]:
    """Read a checkpoint in the old format; it may run code that its author put there.

    Returns:
        Its tensors, and the rest.

    Raises:
        LETError: it was saved by more than one rank, or is damaged.
    """
    files = legacy_files(folder)
    if len(files) != 1:
        raise LETError(
            f"The checkpoint {folder} is split over {len(files)} ranks in the old format;"
            " convert it first with Megatron: --load it with its layout and --ckpt-convert-format"
            " torch_dist."
        )
    try:
        state = torch.load(files[0], map_location="cpu", weights_only=False)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise LETError(f"{files[0]} cannot be read ({first_line(error)}).") from error
    if not isinstance(state, dict) or "model" not in state:
        raise LETError(f"{files[0]} holds no model.")
    return LegacyTensors(dict(_flat(state["model"]))), state


def _flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
