"""A preprocessing job: what its tasks and its merge need, on any node."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_let.data.text_tokenizer import TextTokenizer
from megatron_let.errors import LETError
from megatron_let.preprocessing.shards import Selection, record_of

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Job:
    """What the tasks of a run and its merge need, on any node.

    Attributes:
        prefix: data sets are named `PREFIX_KEY[_SPLIT][_SUBSET]_document`.
        tasks: input files of each task.
        subset_weights: factor of each subset's share in the blend.
        strict: raise an error at the first unusable document.
        max_document_bytes: longer documents are rejected.
        plan: everything that determines the bytes of the result.
        ignored: why each file that is not read is ignored.
    """

    prefix: Path
    tasks: list[list[str]]
    tokenizer: TextTokenizer
    selection: Selection
    subset_weights: dict[str, float]
    strict: bool
    max_document_bytes: int
    plan: dict[str, Any]
    ignored: dict[str, str]

    @property
    def work(self) -> Path:
        """Folder of the shards and logs."""
        return self.path(".work")

    def path(self, suffix: str) -> Path:
        """Return the path of a file next to the data sets."""
        return self.prefix.with_name(self.prefix.name + suffix)

    def missing(self) -> list[int]:
        """Return the tasks whose shard is not complete."""
        return [r for r in range(len(self.tasks)) if not record_of(self.work, r).is_file()]

    def explain(self, error: OSError) -> LETError:
        """Return a failure to read or write as a sentence for the user."""
        if error.errno in _DISK_FULL:
            return LETError(
                f"The disk of {self.prefix.parent} is full ({error.strerror}); free some space and"
                " run the same command again, which continues where it stopped."
            )
        return LETError(f"{error}; correct this and run the same command again to continue.")
