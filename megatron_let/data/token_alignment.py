"""LET with two tokenizers: the same text under the teacher's own, and who stands beside whom.

Each of the student's tokens is aligned with the last of the teacher's tokens that ends at or before
its own end, in bytes of the text, so that the teacher never knows more than the student has read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_let.data.token_bytes import TokenBytes, load_token_bytes
from megatron_let.errors import LETError, first_line
from megatron_let.teacher.inspect import TeacherFolder

Ids = npt.NDArray[np.int64]
NONE = -1

# Key of a sample for the same text under the teacher's tokenizer, beside Megatron's own keys.
TEACHER_TOKENS = "teacher_tokens"


def teacher_length(sequence_length: int, max_positions: int | None) -> int:
    """Tokens that a sample is given under the teacher's tokenizer: twice the student's, at most.

    Where the text needs more, the student's last tokens have no teacher.
    """
    return min(2 * sequence_length, max_positions or 2 * sequence_length)


def end_bytes(text: str) -> Ids:
    """Byte at which each character of a text ends; a lone surrogate is one undecodable byte."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sizes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    sizes[(points >= 0xD800) & (points <= 0xDFFF)] = 1
    return np.cumsum(sizes, dtype=np.int64)


class Realigner:
    """Reads a student's sample under the teacher's tokenizer."""

    def __init__(self, student: TokenBytes, teacher: Any, teacher_eod: int, length: int) -> None:
        """
        Args:
            student: its vocabulary.
            teacher: its tokenizer, a `tokenizers.Tokenizer`; its post-processor is taken off.
            teacher_eod: id that ends a document.
            length: of the teacher's sequence.
        """
        from tokenizers import Tokenizer, processors

        self._pieces, self._student_eod = student.pieces, student.eod
        self._adds_space = student.adds_space
        self._teacher = Tokenizer.from_str(teacher.to_str())
        # A byte-level one would cut white space off the ends that it reports.
        self._teacher.post_processor = processors.Sequence([])
        self._teacher.no_padding()
        self._teacher.no_truncation()
        self._teacher_eod = teacher_eod
        self.length = length

    def __call__(self, tokens: Ids) -> Ids:
        """Student's ids `[s]` -> teacher's ids `[length]`, and for each of the student's the index.

        Returns:
            Both in one array, `[length + s]`; the index is -1 where no token of the teacher ends
            in time: at a document's start, and beyond `length`.
        """
        ids: list[int] = []
        indices = np.full(len(tokens), NONE, dtype=np.int64)
        ends = np.flatnonzero(tokens == self._student_eod)
        start = 0
        for end in (*ends, len(tokens)):
            # Only behind an end of document is this known to be a document's first token.
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
        """Teacher's ids of one document's tokens, and the index of each of those tokens."""
        pieces = [self._pieces[token] for token in tokens]
        text = b"".join(pieces)
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        if whole and self._adds_space and text.startswith(b" "):
            text, ends = text[1:], np.maximum(ends - 1, 0)
        decoded = text.decode("utf-8", "surrogateescape")
        # Half a character, at a sample's ends, is one that no tokenizer knows; as long, in text.
        clean = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in decoded)
        encoding = self._teacher.encode(clean, add_special_tokens=False)
        character_ends = np.concatenate(([0], end_bytes(decoded)))
        last = np.array([end for _, end in encoding.offsets], dtype=np.int64)
        teacher_ends = np.maximum.accumulate(character_ends[last])
        return encoding.ids, np.searchsorted(teacher_ends, ends, side="right") - 1


def load_realigner(
    tokenizer_type: str, tokenizer_model: Path, folder: TeacherFolder, sequence_length: int
) -> Realigner:
    """Between the student's tokenizer and the teacher's.

    Raises:
        LETError: one of them cannot be used so.
    """
    from transformers import AutoTokenizer

    student = load_token_bytes(tokenizer_type, tokenizer_model)
    try:
        teacher = AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    except Exception as error:  # a missing or damaged tokenizer raises many kinds
        raise LETError(
            f"The teacher {folder.path} has no tokenizer of its own ({first_line(error)}); copy its"
            " tokenizer files beside the model."
        ) from error
    if not teacher.is_fast or teacher.eos_token_id is None:
        raise LETError(
            f"The teacher's tokenizer {folder.path} has no fast form (tokenizer.json) or no"
            " eos_token, which --let-cross-tokenizer needs; convert it with transformers."
        )
    length = teacher_length(sequence_length, folder.max_positions)
    return Realigner(student, teacher.backend_tokenizer, teacher.eos_token_id, length)


class RealignedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """A GPT dataset whose samples also hold the teacher's tokens, made in the data workers."""

    def __init__(self, dataset: Any, realign: Realigner) -> None:
        self._dataset = dataset
        self._realign = realign

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        sample: dict[str, Any] = self._dataset[index]
        sample[TEACHER_TOKENS] = torch.from_numpy(self._realign(sample["tokens"].numpy()))
        return sample
