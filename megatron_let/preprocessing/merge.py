"""Merge a job's shards into data sets; write their blend and the report."""

from __future__ import annotations

import json
import shutil
import struct
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import (
    IndexedDatasetBuilder,
    _IndexReader,
    _IndexWriter,
)

from megatron_let.data.fingerprint import write_sidecar_file
from megatron_let.data.text_tokenizer import token_bytes
from megatron_let.errors import LETError
from megatron_let.files.atomic import atomic_file, write_json, write_text
from megatron_let.preprocessing.job import REJECTED, SPLITS, Job
from megatron_let.preprocessing.shards import Counts

_EXAMPLES = 20


class DatasetBuilder(IndexedDatasetBuilder):
    """Megatron's builder for one sequence per document, with arrays in place of its lists.

    It takes 4 bytes of memory per document, and 28 while it writes the index; the lists take 110.
    """

    def add_index(self, path_prefix: str) -> None:
        """Add a whole data set."""
        index = _IndexReader(path_prefix + ".idx", multimodal=False)
        assert index.dtype == self.dtype
        self.sequence_lengths.append(np.array(index.sequence_lengths))
        with open(path_prefix + ".bin", "rb") as file:
            shutil.copyfileobj(file, self.data_file)

    def finalize(self, idx_path: str) -> None:
        """Write the index, the same bytes as Megatron's."""
        self.data_file.close()
        lengths = np.concatenate(self.sequence_lengths)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        with _IndexWriter(idx_path, self.dtype) as writer:
            file = writer.idx_writer
            file.write(struct.pack("<QQ", len(lengths), len(lengths) + 1))
            file.write(lengths.data)
            file.write((starts * np.dtype(self.dtype).itemsize).data)
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).data)


def merge(job: Job) -> dict[str, Any]:
    """Write the data sets of a job, whose tasks are complete, and its report; delete the shards.

    Raises:
        LETError: no document was written, or `--subset-weights` names no subset.
    """
    records = [json.loads(job.record(rank).read_text()) for rank in range(len(job.tasks))]
    files = {url: _counts(url, rows) for record in records for url, rows in record["files"].items()}
    total: Counts = Counter()
    for counts in files.values():
        total.update(counts)
    report = _nested(total)
    damaged = {url: why for record in records for url, why in record["damage"].items()}
    _check(job, report, damaged)
    data_sets = {name: _data_set(job, name) for name in report["outputs"]}
    for name, prefix in data_sets.items():
        _write_data_set(job, name, prefix)
    named = {*job.options.selection.include_subsets, *job.options.selection.exclude_subsets}
    report |= {
        "plan": job.plan,
        "data_sets": {name: str(prefix) for name, prefix in data_sets.items()},
        "data_args": _write_blend(job, report["outputs"]),
        "dtype": _dtype(job).__name__,
        "written": {
            unit: sum(tally[unit] for tally in report["outputs"].values())
            for unit in ("documents", "tokens", "text_bytes")
        },
        "rejected_examples": _concatenate_rejected(job),
        "damaged_files": damaged,
        "ignored_files": job.ignored,
        "subsets_not_found": sorted(named - {*report["subsets"], *report["filtered"]}),
        "files": {url: _nested(counts) for url, counts in files.items()},
    }
    write_json(job.path(".report.json"), report)
    for path in job.work.glob("[0-9]*"):
        path.unlink()
    return report


def _counts(url: str, rows: list[Any]) -> Counts:
    """Return a file's counts, and check that they contain every document once."""
    counts = Counter({tuple(key): n for *key, n in rows})
    parts = _nested(counts)
    out = sum(tally["documents"] for tally in parts["outputs"].values())
    out += sum(parts["filtered"].values()) + sum(parts["rejected"].values())
    if out != parts["documents_in"]:
        raise RuntimeError(f"{url}: {parts['documents_in']} documents in, {out} out")
    return counts


def _nested(counts: Counts) -> dict[str, Any]:
    """Return counts as nested dictionaries, sorted by name."""
    groups: tuple[str, ...] = ("outputs", "subsets", "filtered", "rejected")
    result: dict[str, Any] = {"documents_in": 0, **{group: {} for group in groups}}
    for (*groups, name), count in sorted(counts.items()):  # type: ignore[assignment]
        part = result
        for group in groups:
            part = part.setdefault(group, {})
        part[name] = count
    return result


def _check(job: Job, report: dict[str, Any], damaged: dict[str, str]) -> None:
    if not report["outputs"]:
        raise LETError(f"No document was written: {_why_nothing(job, report, damaged)}.")
    unknown = sorted(set(job.options.subset_weights) - set(report["subsets"]))
    if unknown:
        raise LETError(
            f"--subset-weights has {unknown[0]!r}, of which nothing was written; the subsets"
            f" are {', '.join(report['subsets'])}."
        )


def _why_nothing(job: Job, report: dict[str, Any], damaged: dict[str, str]) -> str:
    for url, damage in damaged.items():
        return f"{url}: {damage}; copy the file again"
    rejected = ", ".join(f"{count} {reason}" for reason, count in report["rejected"].items())
    return (
        f"{sum(report['filtered'].values())} were filtered and"
        f" {sum(report['rejected'].values())} rejected ({rejected or 'none'}); check --json-keys"
        f" {' '.join(job.options.selection.json_keys)} and the subsets"
    )


def _data_set(job: Job, name: str) -> Path:
    return job.path(f"_{name}_document")


def _dtype(job: Job) -> Any:
    return np.uint16 if token_bytes(job.tokenizer) == 2 else np.int32


def _write_data_set(job: Job, name: str, prefix: Path) -> None:
    bin_path, idx_path = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
    with atomic_file(idx_path) as idx_partial, atomic_file(bin_path) as bin_partial:
        builder = DatasetBuilder(str(bin_partial), dtype=_dtype(job))
        for rank in range(len(job.tasks)):
            shard = job.work / f"{rank:05d}_{name}"
            if shard.with_name(shard.name + ".idx").is_file():
                builder.add_index(str(shard))
        builder.finalize(str(idx_partial))
    write_sidecar_file(prefix, job.tokenizer, job.plan["tokenizer name"])


def _concatenate_rejected(job: Job) -> list[dict[str, Any]]:
    """Concatenate the rejections of all shards; return the first ones."""
    with atomic_file(job.path(REJECTED)) as partial, partial.open("wb") as target:
        for rank in range(len(job.tasks)):
            with (job.work / f"{rank:05d}{REJECTED}").open("rb") as source:
                shutil.copyfileobj(source, target)
    with job.path(REJECTED).open() as lines:
        return [json.loads(line) for line in islice(lines, _EXAMPLES)]


def blend_weights(tokens: Mapping[str, int], factors: Mapping[str, float]) -> dict[str, float]:
    """Return sampling weights: each data set's share of the tokens times its factor, summing to 1.

    Args:
        factors: how often a data set is sampled relative to its share; 1 if absent.

    Raises:
        LETError: every weight is 0.
    """
    weighted = {name: count * factors.get(name, 1.0) for name, count in tokens.items()}
    total = sum(weighted.values())
    if not total:
        raise LETError("--subset-weights sets every weight to 0; give one subset a factor above 0.")
    return {name: weight / total for name, weight in weighted.items() if weight > 0}


def _write_blend(job: Job, outputs: dict[str, dict[str, int]]) -> str | None:
    """Write Megatron's data-args file of a run with several data sets of one key."""
    selection = job.options.selection
    if selection.split is not None:
        path = job.path(".data_args.json")
        blends = {split: _blend(job, outputs, split) for split in SPLITS}
        write_json(path, {s: [w for pair in b for w in pair] or None for s, b in blends.items()})
    elif selection.per_subset:
        path = job.path(".data_args.txt")
        lines = (f"{weight} {prefix}\n" for weight, prefix in _blend(job, outputs, None))
        write_text(path, "".join(lines))
    else:
        return None
    return str(path)


def _blend(
    job: Job, outputs: dict[str, dict[str, int]], split: str | None
) -> list[tuple[str, str]]:
    """Return weight and prefix of each data set of a split."""
    selection = job.options.selection
    key = selection.json_keys[0]
    start = f"{key}_" if split is None else f"{key}_{split}_"
    tokens = {n: tally["tokens"] for n, tally in outputs.items() if f"{n}_".startswith(start)}
    if not tokens:
        return []
    factors = {
        selection.output_name(key, split, subset): factor
        for subset, factor in job.options.subset_weights.items()
    }
    weights = blend_weights(tokens, factors)
    return [(f"{weight:.8f}", str(_data_set(job, name))) for name, weight in weights.items()]
