"""Selection of the documents that preprocessing writes, and of their data sets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

SPLITS = ("train", "valid", "test")


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

    @property
    def needs_subset(self) -> bool:
        """Return whether a document without a subset is unusable."""
        return bool(self.include_subsets or self.exclude_subsets or self.per_subset)

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
