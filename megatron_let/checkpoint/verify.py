"""Compare the models in two folders, by tensor and by logits."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_let.checkpoint.architecture import to_megatron
from megatron_let.checkpoint.load_check import ARCHITECTURE_ARGUMENTS, first_difference
from megatron_let.checkpoint.parameter_mapping import parameter_mappings
from megatron_let.checkpoint.reference_models import logits
from megatron_let.checkpoint.weights import Weights
from megatron_let.errors import LETError
from megatron_let.teacher.tokenizer import read_tokenizer


@dataclass(frozen=True)
class TensorAudit:
    """Tensor-by-tensor comparison of two models.

    Attributes:
        num_tensors: tensors that were read from both models: the Hugging Face tensors of the
            architecture, and others that both have.
        largest_difference: largest difference over all elements, in fp32.
        unused: tensors of one of the models that are not part of the architecture.
    """

    num_tensors: int
    num_bitwise: int
    largest_difference: float
    different: tuple[str, ...]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class LogitComparison:
    """Two models' logits on the same tokens.

    Attributes:
        top_token_agreement: fraction of positions with the same most likely token.
        perplexities: perplexity per token of each model.
    """

    num_tokens: int
    largest_difference: float
    top_token_agreement: float
    perplexities: tuple[float, float]


def audit(first: Weights, second: Weights) -> TensorAudit:
    """Compare every tensor of two models, one at a time.

    Raises:
        LETError: the architectures differ.
    """
    _check_same_architecture(first, second)
    names = [name for mapping in parameter_mappings(first.architecture) for name in mapping.names]
    left_over = set(first.unused()), set(second.unused())
    names += sorted(left_over[0] & left_over[1])
    different, largest = [], 0.0
    for name in names:
        a, b = first.read(name), second.read(name)
        if a.dtype != b.dtype or not torch.equal(a, b):
            different.append(name)
            # A NaN makes the difference NaN, which no tolerance accepts.
            gap = float((a.float() - b.float()).abs().max()) if a.shape == b.shape else np.inf
            largest = gap if np.isnan(gap) else max(largest, gap)
    unused = tuple(sorted(left_over[0] ^ left_over[1]))
    return TensorAudit(len(names), len(names) - len(different), largest, tuple(different), unused)


def _check_same_architecture(first: Weights, second: Weights) -> None:
    architectures = first.architecture, second.architecture
    names = [*ARCHITECTURE_ARGUMENTS, "vocab_size"]
    if all(one.num_experts and not one.dense_layers for one in architectures):
        names.remove("ffn_hidden_size")  # no layer has it
    ours, theirs = (argparse.Namespace(**to_megatron(one)) for one in architectures)
    difference = first_difference(ours, theirs, names)
    if difference is not None:
        name, value, other = difference
        raise LETError(
            f"{first.folder} and {second.folder} have different architectures: {name} is {value}"
            f" and {other}."
        )


def compare_logits(first: Weights, second: Weights, tokens: torch.Tensor) -> LogitComparison:
    """Run both models in fp32 on the same tokens, one after the other.

    Args:
        tokens: [b, s].
    """
    ours = logits(first, tokens)
    theirs = logits(second, tokens)
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    return LogitComparison(
        tokens.numel(),
        float((ours - theirs).abs().max()),
        float(same),
        (_perplexity(ours, tokens), _perplexity(theirs, tokens)),
    )


def _perplexity(found: torch.Tensor, tokens: torch.Tensor) -> float:
    loss = torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return float(loss.exp())


def sample_tokens(weights: Weights, count: int, length: int, data: Path | None) -> torch.Tensor:
    """Return tokens of indexed data or of a fixed text; random ones without data and tokenizer.

    Returns:
        [count, length] int64.

    Raises:
        LETError: the data has too few tokens, or tokens outside the model's vocabulary.
    """
    if data is not None:
        ids = _from_data(data, count * length)
    elif weights.tokenizer is not None and weights.tokenizer.is_dir():
        ids = _from_text(weights.tokenizer, count * length)
    else:
        generator = torch.Generator().manual_seed(1234)
        ids = torch.randint(weights.architecture.vocab_size, (count * length,), generator=generator)
    if int(ids.max()) >= weights.architecture.vocab_size:
        raise LETError(
            f"The data {data} has token {int(ids.max())} and the model has"
            f" {weights.architecture.vocab_size} tokens; give data of the model's tokenizer."
        )
    return ids.view(count, length)


def _from_data(prefix: Path, needed: int) -> torch.Tensor:
    from megatron_let.data.indexed import open_indexed

    data = open_indexed(prefix)
    parts: list[np.ndarray] = []
    for index in range(len(data)):
        parts.append(np.asarray(data[index], dtype=np.int64))
        if sum(map(len, parts)) >= needed:
            return torch.from_numpy(np.concatenate(parts)[:needed])
    raise LETError(f"The data {prefix} has fewer than {needed} tokens; give more data.")


def _from_text(tokenizer: Path, needed: int) -> torch.Tensor:
    from megatron_let.files.environment_text import environment_text

    encode = read_tokenizer(tokenizer)
    ids: list[int] = []
    for text in environment_text(16 * needed):
        ids += encode(text, add_special_tokens=False).input_ids
        if len(ids) >= needed:
            return torch.tensor(ids[:needed])
    raise LETError(f"The tokenizer {tokenizer} returns no tokens for plain text.")
