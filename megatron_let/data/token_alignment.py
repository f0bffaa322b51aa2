"""Token alignment: LET with a student and a teacher that have different tokenizers.

The teacher reads the same text under its own tokenizer. Each student token is aligned with the
last teacher token that ends at or before the student token's end, in bytes of the text, so that
the teacher never reads ahead of the student.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_let.data.text_tokenizer import (
    HuggingFaceText,
    SentencePieceText,
    load_text_tokenizer,
)
from megatron_let.data.wrapper import DatasetWrapper
from megatron_let.errors import LETError
from megatron_let.teacher.inspect import TeacherFolder
from megatron_let.teacher.tokenizer import PROBE_TEXT, read_tokenizer

Ids = npt.NDArray[np.int64]
NONE = -1

# Key of a sample's text under the teacher's tokenizer, next to Megatron's keys.
TEACHER_TOKENS = "teacher_tokens"

_UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # of SentencePiece


@dataclass(frozen=True)
class TokenBytes:
    """A vocabulary as bytes.

    Attributes:
        pieces: bytes of each id; empty for tokens without text.
        eod: id that ends a document.
        adds_space: the tokenizer prepends a space to a document, which is not part of its text.
    """

    pieces: Sequence[bytes]
    eod: int
    adds_space: bool


def load_token_bytes(tokenizer_type: str, model: Path) -> TokenBytes:
    """Read a tokenizer's vocabulary as bytes, and check that its tokens spell the text.

    Args:
        tokenizer_type, model: as in `load_text_tokenizer`.

    Raises:
        LETError: the files are unusable, or the tokens do not spell the text they encode.
    """
    tokenizer = load_text_tokenizer(tokenizer_type, model)
    if isinstance(tokenizer, SentencePieceText):
        pieces, adds_space = _sentence_piece_bytes(tokenizer)
    else:
        pieces, adds_space = _hugging_face_bytes(tokenizer)
    text = b"".join(pieces[index] for index in tokenizer.encode([PROBE_TEXT])[0])
    spelled = text.removeprefix(b" ") if adds_space else text
    # A vocabulary that lacks characters of the probe gives its unknown token.
    if _UNKNOWN not in text and spelled != PROBE_TEXT.encode():
        raise LETError(
            f"The tokens of {model} do not spell the text that they encode, which a teacher with"
            " another tokenizer has to read; use a byte-level or SentencePiece tokenizer."
        )
    return TokenBytes(pieces, tokenizer.eod, adds_space)


def _hugging_face_bytes(tokenizer: HuggingFaceText) -> tuple[list[bytes], bool]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    decoder = json.dumps(json.loads(tokenizer.backend.to_str())["decoder"])
    byte_of = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}
    byte_level = '"ByteLevel"' in decoder
    added = tokenizer.backend.get_added_tokens_decoder()
    pieces = [b""] * (tokenizer.largest_id + 1)
    for index, token in tokenizer.vocabulary().items():
        if index in added:
            pieces[index] = b"" if added[index].special else token.encode()
        elif byte_level:
            pieces[index] = b"".join(byte_of.get(character, b"") for character in token)
        else:
            pieces[index] = _spelled(token)
    return pieces, not byte_level and ('"Strip"' in decoder or '"Metaspace"' in decoder)


def _sentence_piece_bytes(tokenizer: SentencePieceText) -> tuple[list[bytes], bool]:
    processor = tokenizer.processor
    pieces = [
        b"" if processor.is_control(index)
        else _UNKNOWN if processor.is_unknown(index)
        else _spelled(token)
        for index, token in tokenizer.vocabulary().items()
    ]  # fmt: skip
    return pieces, processor.encode_as_pieces("a")[0].startswith(_SPACE)


def _spelled(token: str) -> bytes:
    """Return the bytes of a SentencePiece token: `<0xAB>` is a byte, a low block is a space."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()


def teacher_length(sequence_length: int, max_positions: int | None) -> int:
    """Return the number of teacher tokens per sample: at most twice the student's.

    If the text needs more, the student's last tokens have no teacher state.
    """
    return min(2 * sequence_length, max_positions or 2 * sequence_length)


def end_bytes(text: str) -> Ids:
    """Return the byte at which each character ends; a lone surrogate is one undecodable byte."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sizes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    sizes[(points >= 0xD800) & (points <= 0xDFFF)] = 1
    return np.cumsum(sizes, dtype=np.int64)


class TokenAligner:
    """Encodes a student's sample with the teacher's tokenizer and aligns the tokens.

    Args:
        teacher: the teacher's `tokenizers.Tokenizer`; a copy is used without its post-processor.
        teacher_eod: id that ends a document.
        length: number of teacher tokens per sample.
    """

    def __init__(self, student: TokenBytes, teacher: Any, teacher_eod: int, length: int) -> None:
        from tokenizers import Tokenizer, processors

        self._student = student
        self._teacher = Tokenizer.from_str(teacher.to_str())
        # A byte-level post-processor would trim white space from the offsets.
        self._teacher.post_processor = processors.Sequence([])
        self._teacher.no_padding()
        self._teacher.no_truncation()
        self._teacher_eod = teacher_eod
        self.length = length

    def __call__(self, tokens: Ids) -> Ids:
        """Map student ids `[s]` to teacher ids `[length]` and the aligned index of each token.

        Returns:
            Both in one array, `[length + s]`; the index is -1 if no teacher token ends in time, at
            a document's start and beyond `length`.
        """
        ids: list[int] = []
        indices = np.full(len(tokens), NONE, dtype=np.int64)
        ends = np.flatnonzero(tokens == self._student.eod)
        start = 0
        for end in (*ends, len(tokens)):
            # Only after an end of document is `start` known to be a document's first token.
            found, index = self._document(tokens[start:end], whole=start > 0)
            indices[start:end] = np.where(index == NONE, NONE, index + len(ids))
            ids += found
            if end < len(tokens):
                indices[end] = len(ids)
                ids.append(self._teacher_eod)
            start = end + 1
        padding = [self._teacher_eod] * (self.length - len(ids))
        indices[indices >= self.length] = NONE
        return np.concatenate((np.array((ids + padding)[: self.length], dtype=np.int64), indices))

    def _document(self, tokens: Ids, whole: bool) -> tuple[list[int], Ids]:
        """Return the teacher ids of one document and the aligned index of each student token."""
        pieces = [self._student.pieces[token] for token in tokens]
        text = b"".join(pieces)
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        if whole and self._student.adds_space and text.startswith(b" "):
            text, ends = text[1:], np.maximum(ends - 1, 0)
        decoded = text.decode("utf-8", "surrogateescape")
        # A sample may start or end within a character: replace each such byte by one character.
        clean = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in decoded)
        encoding = self._teacher.encode(clean, add_special_tokens=False)
        character_ends = np.concatenate(([0], end_bytes(decoded)))
        last = np.array([end for _, end in encoding.offsets], dtype=np.int64)
        teacher_ends = np.maximum.accumulate(character_ends[last])
        return encoding.ids, np.searchsorted(teacher_ends, ends, side="right") - 1


def read_teacher_tokenizer(folder: TeacherFolder) -> Any:
    """Read the teacher's Hugging Face tokenizer.

    Raises:
        LETError: it has no fast form, or no token that ends a document.
    """
    teacher = read_tokenizer(folder.path)
    if not teacher.is_fast or teacher.eos_token_id is None:
        raise LETError(
            f"The teacher's tokenizer {folder.path} has no fast form (tokenizer.json) or no"
            " eos_token, which --let-cross-tokenizer needs; convert it with transformers."
        )
    return teacher


def load_token_aligner(
    tokenizer_type: str, tokenizer_model: Path, folder: TeacherFolder, sequence_length: int
) -> TokenAligner:
    """Build the aligner between the student's tokenizer and the teacher's.

    Args:
        tokenizer_type, tokenizer_model: the student's, as in `load_text_tokenizer`.

    Raises:
        LETError: one of the tokenizers cannot be used for alignment.
    """
    student = load_token_bytes(tokenizer_type, tokenizer_model)
    teacher = read_teacher_tokenizer(folder)
    length = teacher_length(sequence_length, folder.max_positions)
    return TokenAligner(student, teacher.backend_tokenizer, teacher.eos_token_id, length)


class TokenAlignedDataset(DatasetWrapper):
    """A GPT dataset that adds the teacher's tokens to each sample, in the data workers."""

    def __init__(self, dataset: Any, aligner: TokenAligner) -> None:
        super().__init__(dataset)
        self._aligner = aligner

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        sample = super().__getitem__(index)
        sample[TEACHER_TOKENS] = torch.from_numpy(self._aligner(sample["tokens"].numpy()))
        return sample
