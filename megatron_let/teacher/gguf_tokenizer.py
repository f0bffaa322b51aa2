"""Split text into words as the tokenizer of a GGUF file does.

The file of a byte-level BPE has its tokens and merges; its pre-tokenizer is only named, by
`tokenizer.ggml.pre`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
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
        LETError: the file names a pre-tokenizer that is not known.
    """
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    kind, name = (
        field.contents() if (field := fields.get(f"tokenizer.ggml.{key}")) else None
        for key in ("model", "pre")
    )
    if kind != "gpt2":
        return  # SentencePiece's
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


def _known_to_transformers() -> dict[str, Any]:
    module = getattr(transformers_gguf, "gguf_tokenizer_mapping", None)
    return getattr(module, "GGUF_PRE_TOKENIZER_SPLITS", {})
