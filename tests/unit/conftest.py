"""Tokenizers and the parser that the tests of several packages share."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import pytest

from megatron_let.config.arguments import add_arguments
from tests.helpers.text_data import save_hugging_face_tokenizer, save_sentence_piece


@pytest.fixture(scope="session")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a byte-level BPE of 600 tokens."""
    return save_hugging_face_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SentencePiece model of 600 pieces."""
    return save_sentence_piece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def parser() -> argparse.ArgumentParser:
    """Parser of Megatron's flags and of LET's."""
    from megatron.training.arguments import add_megatron_arguments

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
