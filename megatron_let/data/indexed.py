"""Documents in memory to Megatron's indexed format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_let.data.counts import Tally
from megatron_let.data.fingerprint import fingerprint, write_side_file
from megatron_let.data.text_tokenizer import HuggingFaceText
from megatron_let.errors import LETError
from megatron_let.files.atomic import partial_path, replace_from_partial

# What was written: documents, tokens with end-of-document, and bytes of text.
IndexedCounts = Tally


def write_indexed(prefix: Path, documents: Iterable[str], tokenizer: Any) -> IndexedCounts:
    """Tokenise documents into `prefix`.bin and `prefix`.idx, each ended by the EOS token.

    Files are written under temporary names and renamed when whole.

    Args:
        prefix: path without suffix.
        documents: texts; empty ones are not written.
        tokenizer: fast Hugging Face tokenizer with an EOS token.

    Raises:
        LETError: there is no text; nothing is written.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    text_tokenizer = HuggingFaceText(tokenizer)
    bin_path, idx_path = (prefix.with_name(prefix.name + s) for s in (".bin", ".idx"))
    dtype = DType.optimal_dtype(text_tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(partial_path(bin_path)), dtype=dtype)
    counts = IndexedCounts()
    for text in documents:
        ids = text_tokenizer.encode([text])[0]
        if not len(ids):
            continue
        ended = np.append(ids, text_tokenizer.eod).astype(dtype)
        builder.add_document(torch.from_numpy(ended), [len(ended)])
        counts.add(Tally(1, len(ended), len(text.encode())))
    if not counts.documents:
        partial_path(bin_path).unlink()
        raise LETError(f"There is no text to write to {prefix}; give text that is not empty.")
    builder.finalize(str(partial_path(idx_path)))
    replace_from_partial(bin_path)
    replace_from_partial(idx_path)
    write_side_file(prefix, fingerprint(text_tokenizer), Path(tokenizer.name_or_path).name)
    return counts
