"""Megatron's data-args files: which data sets a run blends, and with which weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_let.errors import LETError
from megatron_let.files.atomic import partial_path, replace_from_partial, write_json


def blend_weights(tokens: Mapping[str, int], factors: Mapping[str, float]) -> dict[str, float]:
    """Sampling weights: each data set's share of the tokens, times its factor, summing to 1.

    Args:
        tokens: of each data set.
        factors: how often a data set is seen relative to the others; 1 where none is given.

    Raises:
        LETError: every weight is 0.
    """
    weighted = {name: count * factors.get(name, 1.0) for name, count in tokens.items()}
    total = sum(weighted.values())
    if not total:
        raise LETError("--subset-weights leaves nothing to train on; give one a factor above 0.")
    return {name: weight / total for name, weight in weighted.items() if weight > 0}


def blend_list(weights: Mapping[str, float], prefixes: Mapping[str, Path]) -> list[str]:
    """Weights and prefixes in turn, as `--data-path` takes them."""
    return [part for n, w in weights.items() for part in (f"{w:.8f}", str(prefixes[n]))]


def write_data_args(path: Path, blend: list[str]) -> None:
    """Write a file for `--data-args-path`, one data set a line."""
    lines = (f"{weight} {prefix}\n" for weight, prefix in zip(blend[::2], blend[1::2], strict=True))
    partial_path(path).write_text("".join(lines))
    replace_from_partial(path)


def write_per_split_data_args(path: Path, blends: Mapping[str, list[str]]) -> None:
    """Write a file for `--per-split-data-args-path`, with train, valid and test."""
    write_json(path, {split: blends.get(split) or None for split in ("train", "valid", "test")})
