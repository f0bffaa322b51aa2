"""The weight files of a model folder: which ones transformers loads, and whether they are whole."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Container
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_let.errors import LETError, first_line

# In transformers' order of preference; a sharded model has NAME.index.json instead.
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
# Masks, positions and RoPE frequencies, which earlier transformers stored (GPT-2, Pythia).
_OLD_BUFFERS = (
    ".attn.bias", ".attention.bias", ".masked_bias", ".causal_mask", "position_ids", "inv_freq",
)  # fmt: skip


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers would load, whether or not they exist.

    Raises:
        LETError: the index of a sharded model is damaged, or the folder has an adapter.
    """
    # transformers applies it where peft is installed, and ignores it elsewhere.
    if (folder / "adapter_config.json").is_file():
        raise LETError(
            f"The model {folder} has an adapter (adapter_config.json); merge it into the weights"
            " with peft (merge_and_unload) and save the result."
        )
    for name in WEIGHT_NAMES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return [folder / shard for shard in _shards(index)]
    return []


def has_all_weights(folder: Path) -> bool:
    """Return whether there are weight files and all exist.

    Raises:
        LETError: the index of a sharded model is damaged.
    """
    files = weight_files(folder)
    return bool(files) and all(file.is_file() for file in files)


def check_weight_files(folder: Path) -> None:
    """Check that a folder has all of its weight files and that none is truncated.

    Reads the headers of the files only.

    Raises:
        LETError: there are none, one is missing, or one is shorter than its header says.
    """
    files = weight_files(folder)
    if not files:
        raise LETError(
            f"The model {folder} has none of the weight files that transformers loads:"
            f" {' or '.join(WEIGHT_NAMES)}, or NAME.index.json with its shards."
        )
    for file in files:
        if not file.is_file():
            raise LETError(f"The weight file {file} is missing; copy the folder again.")
        is_whole = _is_whole_safetensors if file.suffix == ".safetensors" else _is_whole_torch
        if not is_whole(file):
            raise LETError(
                f"The weight file {file} is cut short or damaged at "
                f"{file.stat().st_size} bytes; copy it again."
            )


def check_all_loaded(folder: Path, report: dict[str, Any], allowed: Container[str] = ()) -> None:
    """Check transformers' report (`output_loading_info`) of a loaded folder.

    Args:
        allowed: names of tensors that the model may leave out.

    Raises:
        LETError: names weights that are not in the files, or that the model does not have.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        raise LETError(
            f"The model {folder} has no weight for {_some(missing)}; its files are of another"
            " model."
        )
    unread = sorted(
        name
        for name in report["unexpected_keys"]
        if name not in allowed and not name.endswith(_OLD_BUFFERS)
    )
    if unread:
        raise LETError(
            f"The model {folder} has weights that its config.json has no place for:"
            f" {_some(unread)}; its config is of another model."
        )


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LETError(
            f"The weight index {index} is damaged ({first_line(error)}); copy it again."
        ) from error


def _is_whole_safetensors(file: Path) -> bool:
    """Return whether the file opens, which compares its length with its header."""
    try:
        # numpy, because torch takes seconds to import, and no tensor is read.
        with safe_open(file, framework="numpy"):
            return True
    except (SafetensorError, OSError):
        return False


def _is_whole_torch(file: Path) -> bool:
    """Return whether a `torch.save` file opens: a zip by its directory, a pickle by reading."""
    if zipfile.is_zipfile(file):
        return True
    # Only this rare format needs torch, which takes seconds to import.
    import torch

    try:
        torch.load(file, map_location="meta", weights_only=True)
    except Exception:  # a truncated pickle raises many types
        return False
    return True
