"""The bytes that each token of a tokenizer stands for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_let.data.text_tokenizer import HUGGING_FACE, load_text_tokenizer
from megatron_let.errors import LETError

_UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # of SentencePiece
_PROBE = "def f(x):\n        return 1234567 + x  # naïve café, 東京 \U0001f600\n\tThe  end."


@dataclass(frozen=True)
class TokenBytes:
    """A vocabulary as bytes.

    Attributes:
        pieces: by id; empty for tokens that stand for no text.
        eod: id that ends a document.
        adds_space: the tokenizer puts a space before a document, which is none of its text.
    """

    pieces: Sequence[bytes]
    eod: int
    adds_space: bool


def load_token_bytes(tokenizer_type: str, model: Path) -> TokenBytes:
    """Read a tokenizer's vocabulary as bytes, and check that a text can be read back from it.

    Args:
        tokenizer_type, model: as in `load_text_tokenizer`.

    Raises:
        LETError: the files are unusable, or the tokenizer's tokens do not spell its text.
    """
    tokenizer = load_text_tokenizer(tokenizer_type, model)
    read = _hugging_face if tokenizer_type == HUGGING_FACE else _sentence_piece
    pieces, adds_space = read(tokenizer, model)
    text = b"".join(pieces[index] for index in tokenizer.encode([_PROBE])[0])
    spelled = text.removeprefix(b" ") if adds_space else text
    # One that lacks letters says so itself, by its unknown token.
    if _UNKNOWN not in text and spelled != _PROBE.encode():
        raise LETError(
            f"The tokens of {model} do not spell the text that they are made from, which a teacher"
            " with another tokenizer has to read; use a byte-level or SentencePiece tokenizer."
        )
    return TokenBytes(pieces, tokenizer.eod, adds_space)


def _hugging_face(tokenizer: Any, model: Path) -> tuple[list[bytes], bool]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backend = tokenizer.backend
    decoder = json.dumps(json.loads(backend.to_str())["decoder"])
    byte_of = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}
    byte_level = '"ByteLevel"' in decoder
    added = {index: token for index, token in backend.get_added_tokens_decoder().items()}
    pieces = [b""] * tokenizer.vocab_size
    for index, token in tokenizer.vocabulary().items():
        if index in added:
            pieces[index] = b"" if added[index].special else token.encode()
        elif byte_level:
            pieces[index] = b"".join(byte_of.get(character, b"") for character in token)
        else:
            pieces[index] = _spelled(token)
    return pieces, not byte_level and ('"Strip"' in decoder or '"Metaspace"' in decoder)


def _spelled(token: str) -> bytes:
    """A SentencePiece token: `<0xAB>` is a byte, a low block a space."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()


def _sentence_piece(tokenizer: Any, model: Path) -> tuple[list[bytes], bool]:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model))
    pieces = [
        b"" if processor.is_control(index)
        else _UNKNOWN if processor.is_unknown(index)
        else _spelled(processor.id_to_piece(index))
        for index in range(tokenizer.vocab_size)
    ]  # fmt: skip
    return pieces, processor.encode_as_pieces("a")[0].startswith(_SPACE)
