"""Indexed data reads back as written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_let.data.indexed import write_indexed
from megatron_let.errors import LETError
from tests.helpers.text_data import documents_of


def files(folder: Path) -> set[str]:
    """Return names of indexed files that look complete."""
    return {path.name for path in folder.iterdir() if path.suffix in (".bin", ".idx")}


texts = st.lists(st.text(max_size=60), max_size=6).filter(lambda documents: any(documents))


@settings(max_examples=40, deadline=None)
@given(documents=texts)
def test_written_documents_read_back_unchanged(
    documents: list[str], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prefix = tmp_path_factory.mktemp("indexed") / "text"
    counts = write_indexed(prefix, documents, tokenizer)
    written = [text for text in documents if text]
    found = documents_of(prefix)
    assert [tokenizer.decode(tokens[:-1]) for tokens in found] == written
    assert all(tokens[-1] == 0 and 0 not in tokens[:-1] for tokens in found)
    assert counts["documents"] == len(written)
    assert counts["tokens"] == sum(map(len, found))
    assert counts["text_bytes"] == sum(len(text.encode()) for text in written)


def test_each_text_is_one_megatron_document(tmp_path: Path, tokenizer: Any) -> None:
    write_indexed(tmp_path / "text", ["one", "", "three"], tokenizer)
    dataset = IndexedDataset(str(tmp_path / "text"))
    assert dataset.document_indices.tolist() == [0, 1, 2]
    assert dataset.sequence_lengths.tolist() == [4, 6]


def test_token_ids_beyond_16_bits_are_kept(tmp_path: Path) -> None:
    words = {"<end>": 0} | {str(number): number for number in range(1, 70_000)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    large = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    write_indexed(tmp_path / "text", ["1 65535 65536 69999"], large)
    assert documents_of(tmp_path / "text") == [[1, 65535, 65536, 69999, 0]]
    assert IndexedDataset(str(tmp_path / "text")).index.dtype == np.int32


def test_finished_write_leaves_no_temporary_file(tmp_path: Path, tokenizer: Any) -> None:
    write_indexed(tmp_path / "deep" / "text.v1", ["one"], tokenizer)
    assert files(tmp_path / "deep") == {"text.v1.bin", "text.v1.idx"}
    assert not list(tmp_path.rglob("*partial*"))


def test_interrupted_write_keeps_existing_files(tmp_path: Path, tokenizer: Any) -> None:
    def interrupted() -> Iterator[str]:
        yield "new"
        raise KeyboardInterrupt

    prefix = tmp_path / "text"
    write_indexed(prefix, ["old"], tokenizer)
    before = {name: (tmp_path / name).read_bytes() for name in ("text.bin", "text.idx")}
    with pytest.raises(KeyboardInterrupt):
        write_indexed(prefix, interrupted(), tokenizer)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_interrupted_write_leaves_no_file(tmp_path: Path, tokenizer: Any) -> None:
    def interrupted() -> Iterator[str]:
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_indexed(tmp_path / "text", interrupted(), tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("documents", [[], ["", ""]], ids=["no document", "empty documents"])
def test_empty_text_raises_and_writes_nothing(
    documents: list[str], tmp_path: Path, tokenizer: Any
) -> None:
    """Megatron cannot open an empty .bin file."""
    with pytest.raises(LETError, match="text"):
        write_indexed(tmp_path / "text", documents, tokenizer)
    assert files(tmp_path) == set()
