"""Open a data set of Megatron's indexed format."""

from __future__ import annotations

from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_let.errors import LETError


def open_indexed(prefix: str | Path) -> IndexedDataset:
    """Open a data set of Megatron's indexed format.

    Args:
        prefix: path without suffix.

    Raises:
        LETError: a file is missing or empty.
    """
    for suffix in (".bin", ".idx"):
        path = Path(f"{prefix}{suffix}")
        if not path.is_file() or not path.stat().st_size:
            raise LETError(
                f"The data file {path} does not exist or is empty; give the prefix of an indexed"
                " data set, without .bin or .idx."
            )
    return IndexedDataset(str(prefix))
