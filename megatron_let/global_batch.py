"""Reading a global batch before its first microbatch runs, and sharing its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_let.config import LETError

Iterators = Iterator[Any] | list[Any] | None


@dataclass(frozen=True)
class GlobalBatch:
    """The microbatches of one data-parallel replica, known on all of its model-parallel ranks.

    Attributes:
        tokens: [num_microbatches, b, s] int64, whole sequences, on the training device.
        unmasked_tokens: sum of the loss mask over all replicas; None unless asked for.
    """

    tokens: torch.Tensor
    unmasked_tokens: float | None


def read_ahead(iterators: Iterators, num_microbatches: int) -> tuple[Iterators, list[Any] | None]:
    """Take a global batch from the data iterators of this rank.

    Args:
        iterators: one, one per model chunk (interleaved pipeline), or None where this rank reads
            no data.
        num_microbatches: to take.

    Returns:
        Iterators over the same microbatches for the schedule, and the microbatches of the first
        iterator that this rank reads (None where it reads none).
    """
    if isinstance(iterators, list):
        pairs = [read_ahead(iterator, num_microbatches) for iterator in iterators]
        first = next((batch for _, batch in pairs if batch is not None), None)
        return [iterator for iterator, _ in pairs], first
    if iterators is None:
        return None, None
    batch = [next(iterators) for _ in range(num_microbatches)]
    # The schedule's get_batch changes the dicts that it takes.
    return iter(batch), [dict(microbatch) for microbatch in batch]


def share_tokens(
    batch: list[Any] | None,
    num_microbatches: int,
    shape: tuple[int, int],
    teacher_vocab_size: int,
    device: torch.device,
    count_unmasked: bool,
) -> GlobalBatch:
    """Give every model-parallel rank the tokens that the first one has read.

    Args:
        batch: the first stage's microbatches, with `tokens` [b, s] and `loss_mask` [b, s].
        num_microbatches: of the global batch, per replica.
        shape: (b, s).
        teacher_vocab_size: rows of the teacher's embedding.
        device: of training.
        count_unmasked: also sum the loss mask over the data-parallel replicas.

    Raises:
        LETError: a token id that the teacher does not know.
    """
    group = parallel_state.get_model_parallel_group()
    # One message: the tokens, then the loss mask's sum.
    message = torch.zeros(num_microbatches * shape[0] * shape[1] + 1, dtype=torch.int64)
    if group.rank() == 0:
        assert batch is not None, "the first model-parallel rank reads no data"
        message[:-1] = torch.cat([microbatch["tokens"].reshape(-1) for microbatch in batch])
        _check_ids(message[:-1], teacher_vocab_size)
        if count_unmasked:
            message[-1] = int(sum(microbatch["loss_mask"].sum().item() for microbatch in batch))
    message = message.to(device, non_blocking=True)
    if group.size() > 1:
        torch.distributed.broadcast(message, group=group, group_src=0)
    unmasked = None
    if count_unmasked:
        total = message[-1:].clone()
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
        unmasked = float(total.item())
    return GlobalBatch(message[:-1].view(num_microbatches, *shape), unmasked)


def _check_ids(tokens: torch.Tensor, teacher_vocab_size: int) -> None:
    largest = int(tokens.max())
    if largest >= teacher_vocab_size:
        raise LETError(
            f"The data has token id {largest} but the teacher knows ids below "
            f"{teacher_vocab_size}; prepare the data with the teacher's tokenizer."
        )
