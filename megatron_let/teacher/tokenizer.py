"""Whether student and teacher read the same tokens."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from megatron_let.errors import LETError, first_line
from megatron_let.teacher.inspect import TeacherFolder

# Merges, spaces, digits and bytes, which two vocabularies can split apart though they are equal.
_PROBE_TEXT = "def f(x):\n        return 1234567 + x  # naïve café, 東京 \U0001f600\n\tThe  end."


def check_same_tokenizer(student: Any, folder: TeacherFolder) -> None:
    """Check that the student's tokenizer is the teacher's.

    Args:
        student: Megatron's tokenizer (`megatron.core.tokenizers`).
        folder: the teacher's.

    Raises:
        LETError: the teacher has no tokenizer, or the first token that differs.
    """
    try:
        teacher = AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    except Exception as error:  # a missing or damaged tokenizer raises many kinds
        raise LETError(
            f"The teacher {folder.path} has no tokenizer to compare with the student's "
            f"({first_line(error)}); copy its tokenizer files beside the model."
        ) from error
    check_same_vocabulary(_student_vocabulary(student), _teacher_vocabulary(teacher))
    ids = student.tokenize(_PROBE_TEXT)
    teacher_ids = teacher(_PROBE_TEXT, add_special_tokens=False).input_ids
    # A tokenizer may put a begin- or end-of-document token around the text.
    if teacher_ids not in (ids, ids[1:], ids[:-1], ids[1:-1]):
        raise LETError(
            "The teacher's tokenizer has the student's vocabulary but splits text differently;"
            " use one tokenizer for both."
        )


def check_same_vocabulary(student: dict[int, str], teacher: dict[int, str]) -> None:
    """Compare two vocabularies, id by id.

    Raises:
        LETError: names the first id whose token differs.
    """
    for index in sorted(student.keys() | teacher.keys()):
        ours, theirs = student.get(index), teacher.get(index)
        if ours != theirs:
            raise LETError(
                f"The teacher's tokenizer is not the student's: token {index} is {ours!r} for the"
                f" student and {theirs!r} for the teacher ({len(student)} and {len(teacher)}"
                " tokens); train the student on the teacher's tokenizer, or give"
                " --let-cross-tokenizer."
            )


def _student_vocabulary(tokenizer: Any) -> dict[int, str]:
    # Megatron's `inv_vocab` is {id: token} for Hugging Face and {token: id} for others.
    pairs = tokenizer.inv_vocab.items()
    return (
        {k: v for k, v in pairs}
        if all(isinstance(k, int) for k, _ in pairs)
        else dict(enumerate(tokenizer.vocab))
    )


def _teacher_vocabulary(tokenizer: Any) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}
