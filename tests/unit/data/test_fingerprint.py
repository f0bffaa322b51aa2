"""Training refuses data that another tokenizer made."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from megatron.core.tokenizers import MegatronTokenizer
from transformers import AutoTokenizer

from megatron_let.data.fingerprint import check_data_tokenizer, side_file
from megatron_let.data.indexed import write_indexed
from megatron_let.errors import LETError
from tests.helpers.text_data import (
    documents_of,
    run,
    save_hugging_face_tokenizer,
    save_sentence_piece,
    write_input,
)


def arguments(prefix: Path, **changes: Any) -> Namespace:
    none = dict.fromkeys(
        ("data_args_path", "train_data_path", "valid_data_path", "test_data_path",
         "per_split_data_args_path", "vocab_size")
    )  # fmt: skip
    fixed = {"data_path": [str(prefix)], "mock_data": False, "tokenizer_type": "any"}
    return Namespace(**(none | fixed | changes))


def megatron_tokenizer(path: Path) -> Any:
    library = "huggingface" if path.is_dir() else "sentencepiece"
    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(path), metadata_path={"library": library}
    )


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {
        "hugging face": save_hugging_face_tokenizer(folder / "hf"),
        "smaller": save_hugging_face_tokenizer(folder / "smaller", 500),
        "sentence piece": save_sentence_piece(folder / "sp.model"),
    }
    # One merge exchanged: the same vocabulary, another way to split.
    merges = json.loads((found["hugging face"] / "tokenizer.json").read_text())
    merges["model"]["merges"].reverse()
    tokenizer = AutoTokenizer.from_pretrained(found["hugging face"])
    tokenizer.save_pretrained(folder / "merges")
    (folder / "merges" / "tokenizer.json").write_text(json.dumps(merges))
    # A special token in front, as Llama's: data and run still agree.
    with_start = json.loads((found["hugging face"] / "tokenizer.json").read_text())
    end = {"id": "<|endoftext|>", "type_id": 0}
    with_start["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": end}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    tokenizer.save_pretrained(folder / "start")
    (folder / "start" / "tokenizer.json").write_text(json.dumps(with_start))
    return {**found, "other merges": folder / "merges", "with start": folder / "start"}


@pytest.mark.parametrize("name", ["hugging face", "sentence piece", "with start"])
def test_own_tokenizer_passes(name: str, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    run([write_input(tmp_path / "in.jsonl", ["text"])], tmp_path / "out", tokenizers[name])
    prefix = tmp_path / "out_text_document"
    check_data_tokenizer(arguments(prefix), megatron_tokenizer(tokenizers[name]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smaller", "600 tokens there, 500 in this run"),
        ("sentence piece", "another vocabulary, though both have 600"),
        ("other merges", "text is split differently"),
    ],
)
def test_another_tokenizer_is_refused(
    name: str, message: str, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    source = write_input(tmp_path / "in.jsonl", ["text"])
    run([source], tmp_path / "out", tokenizers["hugging face"])
    prefix = tmp_path / "out_text_document"
    with pytest.raises(LETError, match=message):
        check_data_tokenizer(arguments(prefix), megatron_tokenizer(tokenizers[name]))


def test_another_end_of_document_is_refused(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", ["text"])
    run([source], tmp_path / "out", tokenizers["hugging face"])
    prefix = tmp_path / "out_text_document"
    values = json.loads(side_file(prefix).read_text())
    side_file(prefix).write_text(json.dumps(values | {"eod": 5}))
    with pytest.raises(LETError, match="documents end with token 5 there, 0 in this run"):
        check_data_tokenizer(arguments(prefix), megatron_tokenizer(tokenizers["hugging face"]))


def test_tokenizer_without_an_end_of_document_is_refused(
    tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    run([write_input(tmp_path / "in.jsonl", ["text"])], tmp_path / "out", tokenizers["smaller"])
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["smaller"])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(LETError, match="documents end with token 0 there, None in this run"):
        check_data_tokenizer(
            arguments(tmp_path / "out_text_document"), megatron_tokenizer(tmp_path / "endless")
        )


def test_no_tokenizer_needs_a_vocabulary_that_fits(
    tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    source = write_input(tmp_path / "in.jsonl", ["text"])
    run([source], tmp_path / "out", tokenizers["hugging face"])
    null = {"tokenizer_type": "NullTokenizer"}
    prefix = tmp_path / "out_text_document"
    check_data_tokenizer(arguments(prefix, vocab_size=600, **null), None)
    with pytest.raises(LETError, match="--vocab-size is 256 under NullTokenizer"):
        check_data_tokenizer(arguments(prefix, vocab_size=256, **null), None)


def test_foreign_and_mock_data_pass(tmp_path: Path) -> None:
    check_data_tokenizer(arguments(tmp_path / "foreign"), None)
    check_data_tokenizer(arguments(tmp_path / "mock", mock_data=True), None)


def test_documents_in_memory_get_a_side_file(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["hugging face"])
    counts = write_indexed(tmp_path / "data", ["one two", "", "three"], tokenizer)
    expected = [[*tokenizer(t).input_ids, tokenizer.eos_token_id] for t in ("one two", "three")]
    assert documents_of(tmp_path / "data") == expected
    assert vars(counts) == {"documents": 2, "tokens": sum(map(len, expected)), "text_bytes": 12}
    theirs = megatron_tokenizer(tokenizers["hugging face"])
    check_data_tokenizer(arguments(tmp_path / "data"), theirs)
