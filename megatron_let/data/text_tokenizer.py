"""Text to token ids, in batches: Hugging Face fast tokenizers and SentencePiece models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_let.data.pre_token_cache import WordCache, cutting_pattern
from megatron_let.errors import LETError

HUGGING_FACE = "HuggingFaceTokenizer"
# Megatron reads one .model file under any of these names.
SENTENCE_PIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TOKENIZER_TYPES = (HUGGING_FACE, *SENTENCE_PIECE)

TokenIds = npt.NDArray[np.integer[Any]]


class TextTokenizer(Protocol):
    """What preprocessing needs of a tokenizer.

    Attributes:
        vocab_size: number of ids, special and added tokens included, as Megatron counts them.
        eod: id that ends a document, as Megatron's tokenizer of the same files has it.
    """

    vocab_size: int
    eod: int

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        """Token ids of each text, with no special token added."""

    def vocabulary(self) -> dict[int, str]:
        """Every id and its token."""


def load_text_tokenizer(tokenizer_type: str, model: Path) -> TextTokenizer:
    """Load a tokenizer from local files.

    Args:
        tokenizer_type: one of `TOKENIZER_TYPES`, Megatron's names.
        model: folder of a Hugging Face tokenizer, or a SentencePiece `.model` file.

    Raises:
        LETError: the files are missing, are of another kind, or name no end of document.
    """
    if not model.exists():
        raise LETError(
            f"The tokenizer {model} does not exist; give --tokenizer-model the folder of a Hugging"
            " Face tokenizer or a SentencePiece .model file."
        )
    if tokenizer_type == HUGGING_FACE:
        return HuggingFaceText(load_hugging_face(model))
    return SentencePieceText(model)


class HuggingFaceText:
    """A fast tokenizer of transformers, called without its Python layer."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise LETError(
                f"The tokenizer {tokenizer.name_or_path} has no fast form (tokenizer.json); convert"
                " it with transformers, or give its SentencePiece .model file."
            )
        # Megatron falls back on the separator where no end of text is named.
        eod = tokenizer.eos_token_id
        eod = tokenizer.sep_token_id if eod is None else eod
        if eod is None:
            raise LETError(
                f"The tokenizer {tokenizer.name_or_path} names no end-of-text token; set eos_token"
                " in its tokenizer_config.json."
            )
        self.eod = int(eod)
        self.vocab_size = len(tokenizer)
        self._tokens = {index: token for token, index in tokenizer.get_vocab().items()}
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_padding()
        self.backend.no_truncation()
        plain = cutting_pattern(json.loads(self.backend.to_str())) is not None
        self._words = WordCache(self.backend) if plain else None

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        """Token ids of each text, with no special token added."""
        ids = [self._words.encode(text) if self._words is not None else None for text in texts]
        rest = [text for text, found in zip(texts, ids, strict=True) if found is None]
        encodings = iter(self.backend.encode_batch_fast(rest, add_special_tokens=False))
        return [
            np.array(next(encodings).ids, dtype=np.int32) if found is None else found
            for found in ids
        ]

    def vocabulary(self) -> dict[int, str]:
        """Every id and its token."""
        return self._tokens


class SentencePieceText:
    """A SentencePiece model."""

    def __init__(self, model: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            raise LETError(
                f"The tokenizer {model} is no SentencePiece model; give a .model file, or"
                " --tokenizer-type HuggingFaceTokenizer for a Hugging Face folder."
            ) from error
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise LETError(
                f"The SentencePiece model {model} has no end-of-sentence piece to end documents"
                " with; train it with --eos_id."
            )
        self.vocab_size = self._processor.get_piece_size()

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        """Token ids of each text, with no special token added."""
        return [self._processor.encode_as_numpy(text) for text in texts]

    def vocabulary(self) -> dict[int, str]:
        """Every id and its token."""
        return {index: self._processor.id_to_piece(index) for index in range(self.vocab_size)}


def load_hugging_face(model: Path) -> Any:
    """The tokenizer of a folder, by transformers.

    Raises:
        LETError: no folder, or none with a readable tokenizer.
    """
    from transformers import AutoTokenizer

    if not model.is_dir():
        raise LETError(
            f"The tokenizer {model} is a file; HuggingFaceTokenizer takes the folder that holds"
            " tokenizer.json, and SentencePieceTokenizer takes a .model file."
        )
    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception as error:  # transformers raises a dozen kinds for a damaged folder
        raise LETError(
            f"The tokenizer {model} cannot be read ({str(error).splitlines()[0]}); copy its"
            " tokenizer.json and tokenizer_config.json again."
        ) from error
