"""Compute perplexity over indexed data, per token and per byte of text."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.datasets.utils import get_blend_from_list

from megatron_let.data.fingerprint import check_same_fingerprint
from megatron_let.data.indexed import open_indexed
from megatron_let.data.text_tokenizer import HuggingFaceText, SentencePieceText, TextTokenizer
from megatron_let.errors import LETError
from megatron_let.teacher.inspect import max_positions
from megatron_let.teacher.tokenizer import read_tokenizer


@dataclass(frozen=True)
class Perplexity:
    """Loss of a model on a data set.

    Attributes:
        tokens: number of predicted tokens, including EOD.
        bytes: size of the text in UTF-8, without EOD; None without a tokenizer.
        loss: sum over tokens of -ln p, in nats.
    """

    name: str
    tokens: int
    bytes: int | None
    loss: float

    @property
    def per_token(self) -> float:
        """Return the exponential of the mean loss per token; infinity above a loss of 709."""
        return _exp(self.loss / self.tokens)

    @property
    def per_byte(self) -> float | None:
        """Return the exponential of the mean loss per byte, comparable across tokenizers."""
        return _exp(self.loss / self.bytes) if self.bytes else None

    @property
    def bits_per_byte(self) -> float | None:
        """Return log2 of `per_byte`."""
        return self.loss / self.bytes / math.log(2) if self.bytes else None


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def documents(prefix: Path, max_tokens: int | None) -> Iterator[np.ndarray]:
    """Yield the documents of a data set in order, up to `max_tokens` tokens in total."""
    data = open_indexed(prefix)
    left = max_tokens if max_tokens is not None else int(data.sequence_lengths.sum())
    for index in range(len(data)):
        if left <= 0:
            return
        yield np.asarray(data[index][:left], dtype=np.int64)
        left -= len(data[index])


def windows(prefix: Path, length: int, max_tokens: int | None) -> Iterator[np.ndarray]:
    """Yield the data set in order, in windows of `length` + 1 tokens that cross documents.

    This is how training cuts its samples. Neighbouring windows share a token, so that every token
    but the first is predicted exactly once.
    """
    held = np.empty(0, dtype=np.int64)
    for document in documents(prefix, max_tokens):
        held = np.concatenate([held, document])
        while len(held) > length:
            yield held[: length + 1]
            held = held[length:]
    if len(held) > 1:
        yield held


def check_data(prefixes: list[Path], tokenizer: Path | None) -> None:
    """Check that the data sets can be read and were made with a model's tokenizer.

    Raises:
        LETError: names the first data set for which this is not so.
    """
    text = _text_tokenizer(tokenizer)
    for prefix in prefixes:
        open_indexed(prefix)
        if text is not None:
            check_same_fingerprint(prefix, text)


def _text_tokenizer(tokenizer: Path | None) -> TextTokenizer | None:
    if tokenizer is None:
        return None
    if tokenizer.is_file():
        return SentencePieceText(tokenizer)
    return HuggingFaceText(read_tokenizer(tokenizer))


@torch.no_grad()
def perplexity(
    model: Any,
    prefix: Path,
    length: int,
    tokenizer: Path | None,
    batch_size: int = 1,
    max_tokens: int | None = None,
) -> Perplexity:
    """Compute the loss of a model on every token of a data set.

    Args:
        model: transformers model on its device.
        prefix: path of indexed data without suffix.
        tokenizer: folder or `.model` file of the data's tokenizer, which is compared with the
            data, and counts the bytes of the text; None leaves both out.
        batch_size: windows per forward pass.

    Raises:
        LETError: the data has fewer than two tokens, is of another tokenizer, or its windows are
            too long for the model.
    """
    check_data([prefix], tokenizer)
    text = _text_tokenizer(tokenizer)
    loss, tokens = 0.0, 0
    config = model.config.get_text_config(decoder=True)
    for batch in _batches(windows(prefix, length, max_tokens), batch_size):
        if int(batch.max()) >= config.vocab_size:
            raise LETError(
                f"The data {prefix} has token {int(batch.max())} but the model has a vocabulary of"
                f" {config.vocab_size}; it was made with another tokenizer."
            )
        _check_length(config, batch.shape[1] - 1)
        ids = torch.from_numpy(batch).to(model.device)
        logits = model(ids[:, :-1], use_cache=False).logits.float()
        loss += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        tokens += ids[:, 1:].numel()
    if not tokens:
        raise LETError(f"The data {prefix} has fewer than two tokens; there is nothing to predict.")
    # By document, because a window may begin inside a character.
    read = documents(prefix, max_tokens)
    num_bytes = sum(_num_bytes(text, ids) for ids in read) if text else None
    return Perplexity(prefix.name, tokens, num_bytes, loss)


def _check_length(config: Any, length: int) -> None:
    """Check that a model without RoPE, whose positions are a table, has as many as a window."""
    limit = max_positions(config)
    has_rope = getattr(config, "rope_parameters", None) is not None
    if limit is not None and length > limit and not has_rope:
        raise LETError(
            f"The windows have {length} tokens but the model was built for {limit} positions; give"
            f" --seq-length {limit}."
        )


def _batches(rows: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Stack consecutive rows of equal length, at most `size` of them."""
    for _, of_one_length in itertools.groupby(rows, len):
        yield from map(np.stack, itertools.batched(of_one_length, size))


def _num_bytes(tokenizer: TextTokenizer, ids: np.ndarray) -> int:
    kept = ids[ids != tokenizer.eod].tolist()
    if isinstance(tokenizer, SentencePieceText):
        return len(tokenizer.processor.decode(kept).encode())
    return len(tokenizer.backend.decode(kept, skip_special_tokens=False).encode())


def total(parts: list[Perplexity]) -> Perplexity:
    """Combine data sets; every token has the same weight."""
    known = all(part.bytes is not None for part in parts)
    return Perplexity(
        "all",
        sum(part.tokens for part in parts),
        sum(part.bytes or 0 for part in parts) if known else None,
        sum(part.loss for part in parts),
    )


def blend_of(items: list[str]) -> list[Path]:
    """Return the prefixes of `--data-path`, which may be preceded by weights, in order.

    Raises:
        LETError: only some of the prefixes have a weight.
    """
    try:
        prefixes, _ = get_blend_from_list(items)
    except AssertionError as error:
        raise LETError(
            f"--data-path is {' '.join(items)!r}; give prefixes, or WEIGHT PREFIX pairs."
        ) from error
    return [Path(prefix) for prefix in prefixes]
