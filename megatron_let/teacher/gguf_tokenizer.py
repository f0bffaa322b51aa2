"""Split text into words as the tokenizer of a GGUF file does.

The file of a byte-level BPE has its tokens and merges; its pre-tokenizer is only named, by
`tokenizer.ggml.pre`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import normalizers, pre_tokenizers
from transformers.integrations import gguf as transformers_gguf

from megatron_let.errors import LETError

# Names by llama.cpp (llama-vocab.cpp). GPT-2's expression, which transformers sets without a name:
_LIKE_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "jina-es", "jina-de")
# The same after each digit is split off:
_SINGLE_DIGITS = (
    "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"
)  # fmt: skip
# A word of the vocabulary is one token there, even if no merges lead to it.
_IGNORES_MERGES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "tekken")


def set_pre_tokenizer(file: Path, tokenizer: Any) -> None:
    """Make the tokenizer that transformers read from a GGUF file split text as the file states.

    Raises:
        LETError: the file names a pre-tokenizer that is not known, or user-defined tokens that
            would be found in another text.
    """
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    kind, name, prefix, tokens, types = (
        field.contents() if (field := fields.get(f"tokenizer.ggml.{key}")) else None
        for key in ("model", "pre", "add_space_prefix", "tokens", "token_type")
    )
    if kind == "llama":
        _check_user_defined(file, dict(zip(tokens or [], types or [], strict=False)), prefix)
        _set_sentence_piece(tokenizer.backend_tokenizer, prefix is not False)
    if kind != "gpt2":
        return
    if name in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif name in _known_to_transformers():
        if name in _IGNORES_MERGES:
            tokenizer.backend_tokenizer.model.ignore_merges = True
    elif name not in _LIKE_GPT2:
        given = (
            f"tokenizer.ggml.pre = {name}, which is unknown" if name else "no tokenizer.ggml.pre"
        )
        raise LETError(
            f"The teacher {file} has {given}, so that its tokenizer may split text wrongly; give"
            " the model's Hugging Face folder."
        )


def _check_user_defined(file: Path, types: dict[str, int], prefix: bool | None) -> None:
    """Refuse user-defined tokens at which splitting the text first changes the ids.

    SentencePiece replaces spaces before, and puts one at the beginning of the text only.
    """
    from gguf import TokenType

    for token, kind in types.items():
        in_text = prefix is not False or any(c.isspace() or c == "▁" for c in token)
        if kind == TokenType.USER_DEFINED and in_text:
            raise LETError(
                f"The teacher {file} has the user-defined token {token!r}, at which its tokenizer"
                " may split text wrongly; give the model's Hugging Face folder."
            )


def _set_sentence_piece(backend: Any, space_prefix: bool) -> None:
    """Replace spaces as SentencePiece does; transformers drops one that begins the text."""
    steps = [normalizers.Prepend("▁")] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None


def _known_to_transformers() -> dict[str, Any]:
    module = getattr(transformers_gguf, "gguf_tokenizer_mapping", None)
    return getattr(module, "GGUF_PRE_TOKENIZER_SPLITS", {})
