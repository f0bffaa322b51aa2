"""Megatron's indexed format: write documents from memory, open a data set."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import batched
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_let.data.fingerprint import write_sidecar_file
from megatron_let.data.text_tokenizer import HuggingFaceText
from megatron_let.errors import LETError
from megatron_let.files.atomic import atomic_file


def write_indexed(prefix: Path, documents: Iterable[str], tokenizer: Any) -> dict[str, int]:
    """Tokenize documents into `prefix`.bin and `prefix`.idx, each ended by the EOS token.

    Args:
        prefix: path without suffix.
        documents: texts; empty ones are skipped.
        tokenizer: fast Hugging Face tokenizer with an EOS token.

    Returns:
        Number of `documents`, `tokens` (EOS included) and `text_bytes` (UTF-8).

    Raises:
        LETError: there is no text; nothing is written.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    text_tokenizer = HuggingFaceText(tokenizer)
    bin_path, idx_path = (prefix.with_name(prefix.name + s) for s in (".bin", ".idx"))
    text_bytes = 0
    with atomic_file(idx_path) as idx_partial, atomic_file(bin_path) as bin_partial:
        dtype = DType.optimal_dtype(text_tokenizer.largest_id + 1)
        builder = IndexedDatasetBuilder(str(bin_partial), dtype=dtype)
        for texts in batched(documents, 64):
            for text, ids in zip(texts, text_tokenizer.encode(texts), strict=True):
                if ids:
                    ids.append(text_tokenizer.eod)
                    builder.add_document(torch.tensor(ids), [len(ids)])
                    text_bytes += len(text.encode())
        lengths = builder.sequence_lengths
        if not lengths:
            raise LETError(f"There is no text to write to {prefix}; give text that is not empty.")
        builder.finalize(str(idx_partial))
    write_sidecar_file(prefix, text_tokenizer, Path(tokenizer.name_or_path).name)
    return {"documents": len(lengths), "tokens": sum(lengths), "text_bytes": text_bytes}


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
