"""Encode text in batches: Hugging Face fast tokenizers and SentencePiece models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_let.errors import LETError

HUGGING_FACE = "HuggingFaceTokenizer"
# Megatron reads a .model file under the other names.
_MODEL_FILE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TOKENIZER_TYPES = (HUGGING_FACE, *_MODEL_FILE)


class HuggingFaceText:
    """A fast tokenizer, called and pickled without the Python layer of transformers.

    Attributes:
        vocab_size: number of ids, special and added tokens included, as Megatron counts them.
        largest_id: largest id that can occur; above the number of ids in a vocabulary with gaps.
        eod: id that ends a document, equal to that of Megatron's tokenizer of the same files.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise LETError(
                f"The tokenizer {tokenizer.name_or_path} has no fast form (tokenizer.json); convert"
                " it with transformers, or give its SentencePiece .model file."
            )
        # Like Megatron: the separator, if there is no end-of-text token.
        has_end = tokenizer.eos_token_id is not None
        eod = tokenizer.eos_token_id if has_end else tokenizer.sep_token_id
        if eod is None:
            raise LETError(
                f"The tokenizer {tokenizer.name_or_path} has no end-of-text token; set eos_token"
                " in its tokenizer_config.json."
            )
        self.eod = int(eod)
        self.vocab_size = len(tokenizer)
        self._tokens = {index: token for token, index in tokenizer.get_vocab().items()}
        self.largest_id = max(self._tokens)
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_padding()
        self.backend.no_truncation()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def vocabulary(self) -> dict[int, str]:
        """Return the token of every id."""
        return self._tokens


class SentencePieceText:
    """A SentencePiece model, with the attributes of `HuggingFaceText`."""

    def __init__(self, model: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self.processor = SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            raise LETError(
                f"The tokenizer {model} is not a SentencePiece model; give a .model file, or"
                " --tokenizer-type HuggingFaceTokenizer for a Hugging Face folder."
            ) from error
        self.eod = self.processor.eos_id()
        if self.eod < 0:
            raise LETError(
                f"The SentencePiece model {model} has no end-of-sentence piece to end documents"
                " with; train it with --eos_id."
            )
        self.vocab_size = self.processor.get_piece_size()
        self.largest_id = self.vocab_size - 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""
        return list(self.processor.encode(list(texts), num_threads=1))

    def vocabulary(self) -> dict[int, str]:
        """Return the token of every id."""
        return {index: self.processor.id_to_piece(index) for index in range(self.vocab_size)}


TextTokenizer = HuggingFaceText | SentencePieceText


def token_bytes(tokenizer: TextTokenizer) -> int:
    """Return the size of a token id in a data set: 2 (uint16) or 4 (int32)."""
    # Megatron's DType.optimal_dtype has this limit; importing it would import torch.
    return 2 if tokenizer.largest_id + 1 < 65_500 else 4


def load_text_tokenizer(tokenizer_type: str, model: Path) -> TextTokenizer:
    """Load a tokenizer from local files.

    Args:
        tokenizer_type: one of `TOKENIZER_TYPES`, Megatron's names.
        model: folder of a Hugging Face tokenizer, or a SentencePiece `.model` file.

    Raises:
        LETError: the files are missing, of another kind, or define no end of document.
    """
    if tokenizer_type == HUGGING_FACE:
        return HuggingFaceText(load_hugging_face(model))
    return SentencePieceText(model)


def load_hugging_face(model: Path) -> Any:
    """Load the tokenizer of a folder with transformers.

    Raises:
        LETError: `model` is not a folder, or its tokenizer cannot be read.
    """
    # transformers takes seconds to import.
    from megatron_let.teacher.tokenizer import read_tokenizer

    if not model.is_dir():
        raise LETError(
            f"The tokenizer {model} {'is a file' if model.exists() else 'does not exist'};"
            " HuggingFaceTokenizer takes the folder that holds tokenizer.json, and"
            " SentencePieceTokenizer takes a .model file."
        )
    return read_tokenizer(model)
