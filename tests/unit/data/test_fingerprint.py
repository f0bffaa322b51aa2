"""Training rejects data that another tokenizer made."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from megatron.core.tokenizers import MegatronTokenizer
from transformers import AutoTokenizer

from megatron_let.data.fingerprint import check_data_tokenizer, sidecar_file
from megatron_let.errors import LETError
from tests.helpers.text_data import (
    run,
    save_hugging_face_tokenizer,
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
def tokenizers(
    hugging_face: Path, sentence_piece: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {
        "hugging face": hugging_face,
        "smaller": save_hugging_face_tokenizer(folder / "smaller", 500),
        "sentence piece": sentence_piece,
    }
    # Reversed merges: the same vocabulary, another split.
    merges = json.loads((found["hugging face"] / "tokenizer.json").read_text())
    merges["model"]["merges"].reverse()
    tokenizer = AutoTokenizer.from_pretrained(found["hugging face"])
    tokenizer.save_pretrained(folder / "merges")
    (folder / "merges" / "tokenizer.json").write_text(json.dumps(merges))
    # A special token in front, as Llama adds: data and run still agree.
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


@pytest.fixture(scope="module")
def prefix(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of the Hugging Face tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    run([write_input(folder / "in.jsonl", ["text"])], folder / "out", tokenizers["hugging face"])
    return folder / "out_text_document"


@pytest.mark.parametrize("name", ["hugging face", "sentence piece", "with start"])
def test_same_tokenizer_passes(name: str, tokenizers: dict[str, Path], tmp_path: Path) -> None:
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
def test_different_tokenizer_raises(
    name: str, message: str, tokenizers: dict[str, Path], prefix: Path
) -> None:
    with pytest.raises(LETError, match=message):
        check_data_tokenizer(arguments(prefix), megatron_tokenizer(tokenizers[name]))


def test_different_end_of_document_raises(
    tokenizers: dict[str, Path], prefix: Path, tmp_path: Path
) -> None:
    values = json.loads(sidecar_file(prefix).read_text())
    sidecar_file(tmp_path / "data").write_text(json.dumps(values | {"eod": 5}))
    with pytest.raises(LETError, match="token 5 there, 0 in this run"):
        check_data_tokenizer(
            arguments(tmp_path / "data"), megatron_tokenizer(tokenizers["hugging face"])
        )


def test_tokenizer_without_end_of_document_raises(
    tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    run([write_input(tmp_path / "in.jsonl", ["text"])], tmp_path / "out", tokenizers["smaller"])
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["smaller"])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(LETError, match="token 0 there, None in this run"):
        check_data_tokenizer(
            arguments(tmp_path / "out_text_document"), megatron_tokenizer(tmp_path / "endless")
        )


def test_data_without_sidecar_file_and_mock_data_pass(tmp_path: Path) -> None:
    check_data_tokenizer(arguments(tmp_path / "foreign"), None)
    check_data_tokenizer(arguments(tmp_path / "mock", mock_data=True), None)
    check_data_tokenizer(arguments(tmp_path / "null", tokenizer_type="NullTokenizer"), None)
