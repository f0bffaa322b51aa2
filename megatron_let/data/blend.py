"""Megatron's data-args files: the data sets of a blend and their sampling weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_let.errors import LETError
from megatron_let.files.atomic import atomic_file, write_json


def blend_weights(tokens: Mapping[str, int], factors: Mapping[str, float]) -> dict[str, float]:
    """Return sampling weights: each data set's share of the tokens times its factor, summing to 1.

    Args:
        tokens: number of tokens of each data set.
        factors: how often a data set is sampled relative to its share; 1 if absent.

    Raises:
        LETError: every weight is 0.
    """
    weighted = {name: count * factors.get(name, 1.0) for name, count in tokens.items()}
    total = sum(weighted.values())
    if not total:
        raise LETError("--subset-weights sets every weight to 0; give one subset a factor above 0.")
    return {name: weight / total for name, weight in weighted.items() if weight > 0}


def blend_list(weights: Mapping[str, float], prefixes: Mapping[str, Path]) -> list[str]:
    """Return weights and prefixes alternating, as `--data-path` takes them."""
    return [part for n, w in weights.items() for part in (f"{w:.8f}", str(prefixes[n]))]


def write_data_args(path: Path, blend: list[str]) -> None:
    """Write a file for `--data-args-path`, one data set per line."""
    lines = (f"{weight} {prefix}\n" for weight, prefix in zip(blend[::2], blend[1::2], strict=True))
    with atomic_file(path) as partial:
        partial.write_text("".join(lines))


def write_per_split_data_args(path: Path, blends: Mapping[str, list[str]]) -> None:
    """Write a file for `--per-split-data-args-path`, with train, valid and test."""
    write_json(path, {split: blends.get(split) or None for split in ("train", "valid", "test")})
