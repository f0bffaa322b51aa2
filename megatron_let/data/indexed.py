"""Documents to Megatron's indexed format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder


@dataclass
class IndexedCounts:
    """What was written: documents, tokens with end-of-document, and bytes of text."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


def write_indexed(prefix: Path, documents: Iterable[str], tokenizer: Any) -> IndexedCounts:
    """Tokenise documents into `prefix`.bin and `prefix`.idx, each ended by the EOS token.

    Files are written under temporary names and renamed when whole.

    Args:
        prefix: path without suffix.
        documents: texts; empty ones are not written.
        tokenizer: Hugging Face tokenizer with an EOS token.
    """
    counts = IndexedCounts()
    partial = {s: prefix.with_name(prefix.name + s + ".partial") for s in (".bin", ".idx")}
    prefix.parent.mkdir(parents=True, exist_ok=True)
    dtype = DType.optimal_dtype(len(tokenizer))
    builder = IndexedDatasetBuilder(str(partial[".bin"]), dtype=dtype)
    for text in documents:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        if not tokens:
            continue
        tokens.append(tokenizer.eos_token_id)
        builder.add_document(torch.from_numpy(np.asarray(tokens, dtype=dtype)), [len(tokens)])
        counts.documents += 1
        counts.tokens += len(tokens)
        counts.text_bytes += len(text.encode())
    builder.finalize(str(partial[".idx"]))
    for suffix, path in partial.items():
        path.rename(f"{prefix}{suffix}")
    return counts
