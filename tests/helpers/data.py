"""Small indexed data sets."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_let.data.fingerprint import write_sidecar_file
from megatron_let.data.text_tokenizer import HuggingFaceText

# Of the tiny recipe's tokenizer.
END_OF_DOCUMENT = 255


def write_indexed_data(prefix: Path, vocab_size: int = 256, documents: int = 120) -> Path:
    """Write random walks over the vocabulary, which a model can learn, and return the prefix."""
    generator = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(documents):
        steps = generator.integers(-3, 4, size=generator.integers(50, 300))
        document = np.abs(np.cumsum(steps) + generator.integers(vocab_size)) % (vocab_size - 1)
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_short_documents(prefix: Path) -> Path:
    """Write random documents, several to a sample, each with an end; return the prefix."""
    generator = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(400):
        document = generator.integers(END_OF_DOCUMENT, size=generator.integers(5, 60))
        document = np.append(document, END_OF_DOCUMENT)
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_indexed(prefix: Path, documents: Iterable[str], tokenizer: Any) -> None:
    """Write texts with a fast Hugging Face tokenizer; each that is not empty ends with EOS."""
    text_tokenizer = HuggingFaceText(tokenizer)
    dtype = DType.optimal_dtype(text_tokenizer.largest_id + 1)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in filter(None, text_tokenizer.encode(list(documents))):
        builder.add_document(torch.tensor([*ids, text_tokenizer.eod]), [len(ids) + 1])
    builder.finalize(f"{prefix}.idx")
    write_sidecar_file(prefix, text_tokenizer, Path(tokenizer.name_or_path).name)
