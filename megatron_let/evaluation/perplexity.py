"""Perplexity over indexed data, per token and per byte of text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megatron_let.data.fingerprint import check_same_fingerprint
from megatron_let.data.indexed import open_indexed
from megatron_let.data.text_tokenizer import HuggingFaceText
from megatron_let.errors import LETError


@dataclass(frozen=True)
class Perplexity:
    """Loss of a model on a data set.

    Attributes:
        name: of the data set.
        tokens: predicted, ends of documents among them.
        bytes: of their text in UTF-8, without the ends of documents; None without a tokenizer.
        loss: sum over tokens of -ln p.
    """

    name: str
    tokens: int
    bytes: int | None
    loss: float

    @property
    def per_token(self) -> float:
        """exp of the mean loss of a token."""
        return math.exp(self.loss / self.tokens)

    @property
    def per_byte(self) -> float | None:
        """exp of the mean loss of a byte, which models of different tokenizers share."""
        return math.exp(self.loss / self.bytes) if self.bytes else None

    @property
    def bits_per_byte(self) -> float | None:
        """log2 of `per_byte`."""
        return self.loss / self.bytes / math.log(2) if self.bytes else None


def documents(prefix: Path, max_tokens: int | None) -> Iterator[np.ndarray]:
    """The data set's documents in order, the last one cut at `max_tokens` of them all."""
    data = open_indexed(prefix)
    left = max_tokens if max_tokens is not None else int(data.sequence_lengths.sum())
    for index in range(len(data)):
        if left <= 0:
            return
        yield np.asarray(data[index][:left], dtype=np.int64)
        left -= len(data[index])


def windows(prefix: Path, length: int, max_tokens: int | None) -> Iterator[np.ndarray]:
    """The data set in order, cut as training cuts it: documents joined, `length` + 1 tokens each.

    Neighbours share a token, so that every token but the first is predicted once.
    """
    held = np.empty(0, dtype=np.int64)
    for document in documents(prefix, max_tokens):
        held = np.concatenate([held, document])
        while len(held) > length:
            yield held[: length + 1]
            held = held[length:]
    if len(held) > 1:
        yield held


@torch.no_grad()
def perplexity(
    model: Any,
    prefix: Path,
    length: int,
    tokenizer: Any | None,
    batch_size: int = 1,
    max_tokens: int | None = None,
) -> Perplexity:
    """Loss of a model on every token of a data set.

    Args:
        model: of transformers, on its device.
        prefix: of indexed data.
        length: tokens that the model sees at once.
        tokenizer: of the data, to count the text's bytes.
        max_tokens: read at most so many.

    Raises:
        LETError: there is nothing to predict, or a token that the model does not know.
    """
    if tokenizer is not None and getattr(tokenizer, "is_fast", False):
        check_same_fingerprint(prefix, HuggingFaceText(tokenizer))
    loss, tokens = 0.0, 0
    vocab_size = model.config.vocab_size
    for batch in _batches(windows(prefix, length, max_tokens), batch_size):
        if int(batch.max()) >= vocab_size:
            raise LETError(
                f"The data {prefix} has token {int(batch.max())} and the model knows {vocab_size};"
                " it was made with another tokenizer."
            )
        ids = torch.from_numpy(batch).to(model.device)
        logits = model(ids[:, :-1]).logits.float()
        loss += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        tokens += ids[:, 1:].numel()
    if not tokens:
        raise LETError(f"The data {prefix} has no two tokens; there is nothing to predict.")
    # By whole documents: a window may begin inside a character.
    texts = documents(prefix, max_tokens)
    num_bytes = sum(_num_bytes(tokenizer, ids) for ids in texts) if tokenizer else None
    return Perplexity(prefix.name, tokens, num_bytes, loss)


def _batches(rows: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Rows of one length stacked, `size` at most."""
    held: list[np.ndarray] = []
    for row in rows:
        if held and (len(held) == size or len(row) != len(held[0])):
            yield np.stack(held)
            held = []
        held.append(row)
    if held:
        yield np.stack(held)


def _num_bytes(tokenizer: Any, ids: np.ndarray) -> int:
    text: str = tokenizer.decode(
        ids[ids != tokenizer.eos_token_id].tolist(), clean_up_tokenization_spaces=False
    )
    return len(text.encode())


def total(parts: list[Perplexity]) -> Perplexity:
    """All data sets as one: every token counts the same."""
    known = all(part.bytes is not None for part in parts)
    return Perplexity(
        "all",
        sum(part.tokens for part in parts),
        sum(part.bytes or 0 for part in parts) if known else None,
        sum(part.loss for part in parts),
    )


def blend_of(items: list[str]) -> list[Path]:
    """Prefixes of `--data-path`, with or without weights, in their order.

    Raises:
        LETError: weights and prefixes do not take turns.
    """
    numbers = [_is_number(item) for item in items]
    if not any(numbers):
        return [Path(item) for item in items]
    if len(items) % 2 or not all(numbers[::2]) or any(numbers[1::2]):
        raise LETError(
            f"--data-path is {' '.join(items)!r}; give prefixes, or WEIGHT PREFIX pairs."
        )
    return [Path(item) for item in items[1::2]]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
