"""Tokenizers that the tests of several packages share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.text_data import save_hugging_face_tokenizer, save_sentence_piece


@pytest.fixture(scope="session")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a byte-level BPE of 600 tokens."""
    return save_hugging_face_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SentencePiece model of 600 pieces."""
    return save_sentence_piece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
