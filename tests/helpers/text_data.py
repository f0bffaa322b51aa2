"""Small tokenizers, text files and preprocessed data sets."""

from __future__ import annotations

import functools
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_let.files.environment_text import environment_text
from megatron_let.preprocessing.job import PreprocessOptions, Selection
from megatron_let.preprocessing.readers import zstd
from megatron_let.preprocessing.run import preprocess

END_OF_TEXT = "<|endoftext|>"


@functools.cache
def real_texts(budget_bytes: int = 300_000) -> list[str]:
    """Return documentation text of this machine in pieces of at most 2,000 characters."""
    return [t[i : i + 2000] for t in environment_text(budget_bytes) for i in range(0, len(t), 2000)]


def save_hugging_face_tokenizer(folder: Path, vocab_size: int = 600) -> Path:
    """Train and save a byte-level BPE as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(real_texts(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)
    fast.save_pretrained(folder)
    return folder


def save_sentence_piece(path: Path, vocab_size: int = 600, **options: Any) -> Path:
    """Train and save a SentencePiece BPE with byte fallback, unless `options` change it."""
    model = io.BytesIO()
    defaults = {"model_type": "bpe", "byte_fallback": True, "character_coverage": 0.99}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(real_texts()),
        model_writer=model,
        vocab_size=vocab_size,
        num_threads=1,
        minloglevel=2,
        **defaults | options,
    )
    path.write_bytes(model.getvalue())
    return path


def json_lines(texts: Sequence[Any], subsets: Sequence[str] = ()) -> bytes:
    """Return one JSON object per line, with the Pile's field for the subset if any is given."""
    lines = []
    for index, text in enumerate(texts):
        meta = {"meta": {"pile_set_name": subsets[index % len(subsets)]}} if subsets else {}
        lines.append(json.dumps({"text": text, **meta}, ensure_ascii=index % 2 == 0) + "\n")
    return "".join(lines).encode()


def write_input(path: Path, texts: Sequence[str], subsets: Sequence[str] = ()) -> Path:
    """Write documents in the format of the file's suffix."""
    lines = json_lines(texts, subsets)
    if path.suffix == ".zst":
        path.write_bytes(zstd.compress(lines))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".parquet":
        rows = [json.loads(line) for line in lines.splitlines()]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    else:
        path.write_bytes(lines)
    return path


def run(inputs: Sequence[Path], prefix: Path, tokenizer: Path, **options: Any) -> dict[str, Any]:
    """Run preprocessing without output; `options` are fields of PreprocessOptions or Selection."""
    names = Selection.__dataclass_fields__
    selection = Selection(**{k: v for k, v in options.items() if k in names})
    rest = {k: v for k, v in options.items() if k not in names}
    kind = "HuggingFaceTokenizer" if tokenizer.is_dir() else "SentencePieceTokenizer"
    given = PreprocessOptions(tuple(map(str, inputs)), prefix, kind, tokenizer, selection, **rest)
    report = preprocess(given, lambda line: None)
    assert report is not None
    return report


def documents_of(prefix: Path | str) -> list[list[int]]:
    """Return the token ids of each document of a data set, read by Megatron."""
    data = IndexedDataset(str(prefix))
    return [data[index].tolist() for index in range(len(data.document_indices) - 1)]


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every result file but the report, which holds a duration.

    The path of the folder, which a blend contains, is removed.
    """
    return {
        path.name: path.read_bytes().replace(str(folder).encode(), b"")
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.endswith(".report.json")
    }
