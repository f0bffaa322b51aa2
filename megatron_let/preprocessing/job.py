"""A preprocessing job: its options, and what its tasks and its merge need, on any node."""

from __future__ import annotations

import errno
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_let.data.text_tokenizer import TextTokenizer
from megatron_let.errors import LETError

# Suffix of the lists of unusable documents.
REJECTED = ".rejected.jsonl"
SPLITS = ("train", "valid", "test")
_MAX_DOCUMENT_BYTES = 16 * 1024 * 1024
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Selection:
    """Documents to write, and their data sets.

    Attributes:
        json_keys: fields that hold text; each gets its own data sets.
        subset_key: field that names a document's subset, dotted if nested.
        include_subsets: subsets to write; empty for all.
        exclude_subsets: subsets not to write.
        split: weights of training, validation and test, or None for no split.
        per_subset: write one data set per subset.
        append_eod: end each document with the end-of-document token.
    """

    json_keys: tuple[str, ...] = ("text",)
    subset_key: str = "meta.pile_set_name"
    include_subsets: tuple[str, ...] = ()
    exclude_subsets: tuple[str, ...] = ()
    split: tuple[float, float, float] | None = None
    per_subset: bool = False
    append_eod: bool = True

    def writes(self, subset: str) -> bool:
        """Return whether documents of a subset are written."""
        included = not self.include_subsets or subset in self.include_subsets
        return included and subset not in self.exclude_subsets

    def output(self, key: str, subset: str, text: str) -> str:
        """Return the name of a document's data set: its key, split and subset.

        The split is drawn from a hash of the text, so equal documents share one and the order of
        the input does not matter.
        """
        split = None if self.split is None else draw_split(text, self.split)
        return self.output_name(key, split, subset)

    def output_name(self, key: str, split: str | None, subset: str) -> str:
        """Return the name of the data set of a key, a split and a subset."""
        parts = [key] if split is None else [key, split]
        if self.per_subset:
            parts.append("".join(c if c.isalnum() or c in "-." else "_" for c in subset).strip("_"))
        return "_".join(parts)


def draw_split(text: str, weights: tuple[float, float, float]) -> str:
    """Return the split of a document, drawn from a hash of its text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    place = int.from_bytes(digest) / 2**64 * sum(weights)
    for name, weight in zip(SPLITS, weights, strict=True):
        place -= weight
        if place < 0:
            return name
    return next(n for n, w in zip(reversed(SPLITS), reversed(weights), strict=True) if w > 0)


@dataclass(frozen=True)
class PreprocessOptions:
    """Options of a preprocessing run, as the command's flags name them.

    Attributes:
        inputs: files, globs and folders, as paths or URLs.
        output_prefix: data sets are named `PREFIX_KEY[_SPLIT][_SUBSET]_document`.
        subset_weights: factor of each subset's share in the blend.
        executor: local, slurm or ray.
        workers: tasks that run at once; None for one per core, or for no limit on a cluster.
        strict: raise an error at the first unusable document.
        overwrite: delete what another run left under the prefix.
        max_document_bytes: longer documents are rejected.
    """

    inputs: tuple[str, ...]
    output_prefix: Path
    tokenizer_type: str
    tokenizer_model: Path
    selection: Selection = field(default_factory=Selection)
    subset_weights: dict[str, float] = field(default_factory=dict)
    executor: str = "local"
    workers: int | None = None
    strict: bool = False
    overwrite: bool = False
    max_document_bytes: int = _MAX_DOCUMENT_BYTES


@dataclass(frozen=True)
class Job:
    """What the tasks of a run and its merge need, on any node.

    Attributes:
        tasks: input files of each task.
        plan: everything that determines the bytes of the result.
        ignored: why each file that is not read is ignored.
    """

    options: PreprocessOptions
    tasks: list[list[str]]
    tokenizer: TextTokenizer
    plan: dict[str, Any]
    ignored: dict[str, str]

    @property
    def work(self) -> Path:
        """Folder of the shards and logs."""
        return self.path(".work")

    @property
    def failure(self) -> Path:
        """File in which a task notes why it failed."""
        return self.work / "failure"

    def path(self, suffix: str) -> Path:
        """Return the path of a file next to the data sets."""
        prefix = self.options.output_prefix
        return prefix.with_name(prefix.name + suffix)

    def record(self, rank: int) -> Path:
        """Return the record of a task's shard, which is complete once it exists."""
        return self.work / f"{rank:05d}.json"

    def missing(self) -> list[int]:
        """Return the tasks whose shard is not complete."""
        return [rank for rank in range(len(self.tasks)) if not self.record(rank).is_file()]

    def explain(self, error: OSError) -> LETError:
        """Return a failure to read or write as a sentence for the user."""
        if error.errno in _DISK_FULL:
            return LETError(
                f"The disk of {self.work.parent} is full ({error.strerror}); free some space and"
                " run the same command again, which continues where it stopped."
            )
        return LETError(f"{error}; correct this and run the same command again to continue.")
