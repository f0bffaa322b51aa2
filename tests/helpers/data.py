"""Small indexed data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


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
