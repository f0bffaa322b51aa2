"""Document counts of preprocessing: written, filtered and rejected, additive over shards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

NO_SUBSET = "(none)"


@dataclass
class Tally:
    """Number of documents, tokens (end of document included) and UTF-8 bytes of text."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def add(self, other: Tally) -> None:
        """Add another tally to this one."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes


@dataclass
class Counts:
    """Counts of one shard or of a whole run; a document is one key of one line.

    Attributes:
        documents_in: documents read; equals written + filtered + rejected.
        outputs: written documents, by data set.
        subsets: written documents, by subset.
        filtered: documents excluded by `--include-subsets` and `--exclude-subsets`, by subset.
        rejected: unusable documents, by reason.
    """

    documents_in: int = 0
    outputs: dict[str, Tally] = field(default_factory=dict)
    subsets: dict[str, Tally] = field(default_factory=dict)
    filtered: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    def written(self) -> Tally:
        """Return the total over all data sets."""
        total = Tally()
        for tally in self.outputs.values():
            total.add(tally)
        return total

    def add_document(self, output: str, subset: str, document: Tally) -> None:
        """Count one written document."""
        self.outputs.setdefault(output, Tally()).add(document)
        self.subsets.setdefault(subset, Tally()).add(document)

    def add(self, other: Counts) -> None:
        """Add another shard's counts to these."""
        self.documents_in += other.documents_in
        for name, tally in other.outputs.items():
            self.outputs.setdefault(name, Tally()).add(tally)
        for name, tally in other.subsets.items():
            self.subsets.setdefault(name, Tally()).add(tally)
        self.filtered.update(other.filtered)
        self.rejected.update(other.rejected)

    def check(self) -> None:
        """Check that every document is counted once.

        Raises:
            RuntimeError: the counts do not add up, which is a bug.
        """
        out = self.written().documents + self.filtered.total() + self.rejected.total()
        if out != self.documents_in:
            raise RuntimeError(f"{self.documents_in} documents in, {out} written or reported")

    def to_json(self) -> dict[str, Any]:
        """Return the counts as plain types, sorted by name."""
        return {
            "documents_in": self.documents_in,
            "outputs": {name: vars(self.outputs[name]) for name in sorted(self.outputs)},
            "subsets": {name: vars(self.subsets[name]) for name in sorted(self.subsets)},
            "filtered": dict(sorted(self.filtered.items())),
            "rejected": dict(sorted(self.rejected.items())),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Counts:
        """Return the counts that `to_json` wrote."""
        return cls(
            values["documents_in"],
            {name: Tally(**tally) for name, tally in values["outputs"].items()},
            {name: Tally(**tally) for name, tally in values["subsets"].items()},
            Counter(values["filtered"]),
            Counter(values["rejected"]),
        )
