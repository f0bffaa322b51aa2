"""Read a folder's tokenizer, and check that student and teacher share one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_let.errors import LETError, first_line

# Merges, spaces, digits and bytes: two tokenizers of one vocabulary can split these differently.
PROBE_TEXT = "def f(x):\n        return 1234567 + x  # naïve café, 東京 \U0001f600\n\tThe  end."

Encode = Callable[[str], list[int]]

# What tokenizers of unlike kinds split unlike: whitespace, accents, scripts, code, emoji, digits.
PROBE_TEXTS = (
    PROBE_TEXT, "", " ", "Hello world", "  two  spaces  ", "\n\n \ta\r\n b\n", "12345 3.14e-10",
    "naïve café, e\u0301, ﬁ ①, Größe, Łódź", "東京タワー 한국어 עברית हिन्दी ไทย ελληνικά русский",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u00a0\u2003\ufeff\u200b x", "▁a ▁",
    "ALLCAPS camelCase it's ISN'T 'quoted'", "for (int i=0; i<n; ++i) { a[i] += 0x1F; } // ok",
    "    return f'{x!r:>10}'\n\n\ndef g(*a, **k): ...", "http://example.org/?a=b&c=%20d",
)  # fmt: skip


def first_different_text(first: Encode, second: Encode) -> str | None:
    """Return the first probe text whose ids differ; None if there is none."""
    return next((text for text in PROBE_TEXTS if first(text) != second(text)), None)


def encoder(tokenizer: Path) -> Encode:
    """Return the function from text to ids of a tokenizer's folder or SentencePiece `.model` file.

    Raises:
        LETError: the tokenizer cannot be read.
    """
    if tokenizer.is_file():
        encode: Encode = read_sentence_piece(tokenizer).encode
        return encode
    return encoder_of(read_tokenizer(tokenizer))


def encoder_of(loaded: Any) -> Encode:
    """Return the function from text to ids, without special tokens, of a loaded tokenizer."""
    return lambda text: list(loaded(text, add_special_tokens=False).input_ids)


def read_sentence_piece(model: Path) -> Any:
    """Return the SentencePieceProcessor of a `.model` file.

    Raises:
        LETError: the file is not one.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        raise LETError(f"The tokenizer {model} is not a SentencePiece model.") from error


def read_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder with transformers, without running code of the folder.

    Raises:
        LETError: the folder has none, a damaged one, one that is code, or a `tokenizer.model` that
            transformers splits text with in another way than SentencePiece.
    """
    try:
        loaded = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a missing or damaged tokenizer raises many types
        if "trust_remote_code" in str(error):
            raise LETError(
                f"The tokenizer {folder} is Python code (auto_map in tokenizer_config.json), which"
                " is never run; give the folder of a tokenizer with a tokenizer.json."
            ) from error
        raise LETError(
            f"The tokenizer {folder} cannot be read ({first_line(error)}); copy its tokenizer"
            " files again."
        ) from error
    model = folder / "tokenizer.model"
    if model.is_file() and not (folder / "tokenizer.json").is_file():
        _check_as_sentence_piece(loaded, model)
    return loaded


def _check_as_sentence_piece(loaded: Any, model: Path) -> None:
    """Check the tokenizer that transformers makes of a `.model` file by an architecture's rules."""
    try:
        processor = read_sentence_piece(model)
    except LETError:
        return  # Llama 3's file of this name is tiktoken's.
    text = first_different_text(processor.encode, encoder_of(loaded))
    if text is not None:
        raise LETError(
            f"The tokenizer {model} has no tokenizer.json beside it, and transformers splits"
            f" {text!r} differently from SentencePiece; add the model's tokenizer.json, or give the"
            " file itself as a SentencePieceTokenizer."
        )


def check_same_tokenizer(student: Any, folder: Path) -> None:
    """Check that the student's tokenizer is the teacher's.

    Args:
        student: Megatron's tokenizer (`megatron.core.tokenizers`).
        folder: the teacher's.

    Raises:
        LETError: the teacher has no tokenizer, or the two differ; names the first token that does.
    """
    teacher = read_tokenizer(folder)
    teacher_vocabulary = {index: token for token, index in teacher.get_vocab().items()}
    check_same_vocabulary(_student_vocabulary(student), teacher_vocabulary)
    teacher_ids = teacher(PROBE_TEXT, add_special_tokens=False).input_ids
    if teacher_ids not in without_special_ends(student.tokenize(PROBE_TEXT)):
        raise LETError(
            "The teacher's tokenizer has the student's vocabulary but splits text differently;"
            " use one tokenizer for both."
        )


def without_special_ends(ids: list[int]) -> list[list[int]]:
    """Return the possible ids of a text itself, for ids that may include BOS or EOS or both.

    Megatron's wrapper of a tokenizer may add either and has no option to leave them out.
    """
    return [ids, ids[1:], ids[:-1], ids[1:-1]]


def check_same_vocabulary(student: dict[int, str], teacher: dict[int, str]) -> None:
    """Compare two vocabularies (id -> token).

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
    if all(isinstance(key, int) for key, _ in pairs):
        return dict(pairs)
    return dict(enumerate(tokenizer.vocab))
