"""Open a data set of Megatron's indexed format."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, _IndexReader

from megatron_let.errors import LETError, first_line


def open_indexed(prefix: str | Path) -> IndexedDataset:
    """Open a data set of Megatron's indexed format.

    Args:
        prefix: path without suffix.

    Raises:
        LETError: a file is missing, empty or not an index, or the two do not belong together, as
            after a copy or a run that was cut short; Megatron would fail at the first document
            beyond the end of the file, or ignore what the index does not name.
    """
    for suffix in (".bin", ".idx"):
        path = Path(f"{prefix}{suffix}")
        if not path.is_file() or not path.stat().st_size:
            raise LETError(
                f"The data file {path} does not exist or is empty; give the prefix of an indexed"
                " data set, without .bin or .idx."
            )
    try:
        # First, because a data set without an index prints a traceback when it is deleted.
        _IndexReader(f"{prefix}.idx", multimodal=False)
    except (AssertionError, ValueError, KeyError, struct.error) as error:
        raise LETError(
            f"The data file {prefix}.idx is not a complete index ({first_line(error)}); copy it"
            " again, or preprocess the text again."
        ) from error
    dataset = IndexedDataset(str(prefix))
    _check_size(dataset, Path(f"{prefix}.bin"))
    return dataset


def _check_size(dataset: IndexedDataset, path: Path) -> None:
    index = dataset.index
    item, named = np.dtype(index.dtype).itemsize, 0
    if len(index):
        named = int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * item
    found = path.stat().st_size
    if named != found:
        raise LETError(
            f"The data file {path} has {found:,} bytes and its index names {named:,}; copy both"
            " files again, or preprocess the text again."
        )
