"""Read a global batch before its first microbatch runs, and share its tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_let.data.token_alignment import TEACHER_TOKENS
from megatron_let.errors import LETError
from megatron_let.teacher.inspect import TeacherFolder

Iterators = Iterator[Any] | list[Any] | None


@dataclass(frozen=True)
class GlobalBatch:
    """Tokens of one data-parallel replica, on all of its model-parallel ranks.

    Attributes:
        tokens: [num_microbatches, b, s] int64 on the training device, whole sequences as the
            teacher reads them; with `--let-cross-tokenizer`,
            [num_microbatches, b, teacher_length + s]. Arbitrary on a stage without a teacher.
        sequence_length: s, of the student.
        unmasked_tokens: sum of the loss mask over all replicas; None unless requested, and on a
            stage without a teacher.
        begins_with_shared: whether the first microbatches are those that the previous call of
            `TokenSharing.share` shared ahead.
        next_tokens: [num_ahead, b, row] of the next global batch; None if it is not known.
    """

    tokens: torch.Tensor
    sequence_length: int
    unmasked_tokens: float | None
    begins_with_shared: bool
    next_tokens: torch.Tensor | None


def read_ahead(iterators: Iterators, num_microbatches: int) -> tuple[Iterators, list[Any] | None]:
    """Read a global batch from the data iterators of this rank.

    Args:
        iterators: one, one per model chunk (interleaved pipeline), or None if this rank reads no
            data.

    Returns:
        Iterators over the same microbatches for the schedule, and the microbatches of the first
        iterator that this rank reads (None if it reads none).
    """
    if isinstance(iterators, list):
        pairs = [read_ahead(iterator, num_microbatches) for iterator in iterators]
        first = next((batch for _, batch in pairs if batch is not None), None)
        return [iterator for iterator, _ in pairs], first
    if iterators is None:
        return None, None
    batch = [next(iterators) for _ in range(num_microbatches)]
    # get_batch changes the dicts that it receives.
    return iter(batch), [dict(microbatch) for microbatch in batch]


class LookAhead:
    """An iterator whose next items can be read ahead without consuming them.

    `peek` puts it under Megatron's `RerunDataIterator`, so that what a step reads, replays and
    saves stays unchanged.
    """

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._seen: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._seen.popleft() if self._seen else next(self._iterator)

    def peek(self, num_items: int) -> list[Any]:
        """Return the next items without consuming them; fewer at the end of the data."""
        while len(self._seen) < num_items:
            try:
                self._seen.append(next(self._iterator))
            except StopIteration:
                break
        return list(self._seen)[:num_items]


def peek(iterators: Iterators, num_microbatches: int, key: str) -> torch.Tensor | None:
    """Return the tokens of the microbatches after those of `read_ahead`, without consuming them.

    Called on the first model-parallel rank, whose tokens are shared.

    Args:
        iterators: as in `read_ahead`.
        num_microbatches: microbatches to read ahead.
        key: `TokenSharing.key`.

    Returns:
        [num_microbatches, b, row] int64; None if this rank reads no data, the data ends earlier,
        or the iterator does not support it.
    """
    if num_microbatches == 0:
        return None
    if isinstance(iterators, list):
        iterators = next((iterator for iterator in iterators if iterator is not None), None)
    source = getattr(iterators, "iterable", None)
    # An iterator that saves its position would save the one after the items read ahead.
    if source is None or hasattr(source, "save_state"):
        return None
    if not isinstance(source, LookAhead):
        source = iterators.iterable = LookAhead(source)  # type: ignore[union-attr]
    microbatches = source.peek(num_microbatches)
    if len(microbatches) < num_microbatches:
        return None
    return torch.stack([microbatch[key] for microbatch in microbatches])


class TokenSharing:
    """Sends the tokens that the first model-parallel rank reads to the stages with a teacher.

    The first rank also keeps the tokens that it shared ahead, and checks whether the next global
    batch begins with them. If not (a skipped iteration, a replayed step), the states computed from
    them are dropped.

    Attributes:
        key: name of the teacher's tokens in a microbatch.
    """

    def __init__(
        self,
        folder: TeacherFolder,
        teacher_length: int | None,
        device: torch.device,
        teacher_stage: int | None,
    ) -> None:
        """Store the teacher's vocabulary and sample length.

        Args:
            teacher_length: tokens per sample under the teacher's tokenizer; None if teacher and
                student read the same tokens.
            teacher_stage: the only pipeline stage that runs the teacher; None if all do.
        """
        self._teacher_stage = teacher_stage
        self._vocab_size, self._device = folder.vocab_size, device
        self._teacher_length = teacher_length or 0
        self.key = "tokens" if teacher_length is None else TEACHER_TOKENS
        self._shared_ahead: torch.Tensor | None = None

    def share(
        self,
        batch: list[Any] | None,
        ahead: torch.Tensor | None,
        shape: tuple[int, int, int],
        num_ahead: int,
        count_unmasked: bool,
    ) -> GlobalBatch:
        """Share one global batch and the first microbatches of the next one.

        Args:
            batch: the first stage's microbatches, with `tokens` [b, s] and `loss_mask` [b, s].
            ahead: the first rank's next tokens, [num_ahead, b, row], if they are known.
            shape: (num_microbatches, b, s).
            num_ahead: microbatches of the next global batch to share.
            count_unmasked: also sum the loss mask over the data-parallel replicas.

        Raises:
            LETError: a token id is not in the teacher's vocabulary, or the data has no teacher
                tokens.
        """
        num_microbatches, micro_batch_size, sequence_length = shape
        rest = (micro_batch_size, self._teacher_length + sequence_length)
        reads = parallel_state.get_model_parallel_group().rank() == 0
        if not (reads or self._has_teacher):
            zero = torch.zeros((), dtype=torch.int64, device=self._device)
            tokens = zero.expand(num_microbatches, *rest)
            return GlobalBatch(tokens, sequence_length, None, False, None)
        # One message: whether the batch begins with tokens shared ahead, whether the next batch is
        # known, the sum of the loss mask, the tokens, the next tokens.
        header = torch.zeros(3, dtype=torch.int64)
        tokens = torch.zeros(num_microbatches + num_ahead, *rest, dtype=torch.int64)
        if reads:
            assert batch is not None, "the first model-parallel rank reads no data"
            _check_key(batch[0], self.key)
            torch.stack([m[self.key] for m in batch], out=tokens[:num_microbatches])
            header[0] = self._begins_with_shared(tokens)
            if ahead is not None:
                tokens[num_microbatches:] = ahead
                header[1] = 1
            if count_unmasked:
                header[2] = int(sum(m["loss_mask"].sum().item() for m in batch))
            _check_ids(tokens, self._vocab_size)
            self._shared_ahead = ahead
        message = torch.cat([header, tokens.flatten()]).to(self._device, non_blocking=True)
        self._send(message)
        counts_unmasked = count_unmasked and self._has_teacher
        num_unmasked = _over_replicas(message[2:3]) if counts_unmasked else None
        begins_with_shared, next_is_known = map(bool, message[:2].tolist())
        tokens = message[3:].view(-1, *rest)
        return GlobalBatch(
            tokens=tokens[:num_microbatches],
            sequence_length=sequence_length,
            unmasked_tokens=num_unmasked,
            begins_with_shared=begins_with_shared,
            next_tokens=tokens[num_microbatches:] if next_is_known else None,
        )

    @property
    def _has_teacher(self) -> bool:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        return self._teacher_stage is None or self._teacher_stage == stage

    def _send(self, message: torch.Tensor) -> None:
        """Send the first rank's message to the ranks that run the teacher."""
        if self._teacher_stage is None:
            _broadcast(message, parallel_state.get_model_parallel_group())
            return
        tensor_parallel = parallel_state.get_tensor_model_parallel_group()
        if self._teacher_stage != 0 and tensor_parallel.rank() == 0:
            pipeline = parallel_state.get_pipeline_model_parallel_group()
            if self._has_teacher:
                torch.distributed.recv(message, group=pipeline, group_src=0)
            else:
                torch.distributed.send(message, group=pipeline, group_dst=self._teacher_stage)
        if self._has_teacher:
            _broadcast(message, tensor_parallel)

    def _begins_with_shared(self, tokens: torch.Tensor) -> bool:
        shared = self._shared_ahead
        return shared is not None and torch.equal(tokens[: len(shared)], shared)


def _broadcast(message: torch.Tensor, group: torch.distributed.ProcessGroup) -> None:
    if group.size() > 1:
        torch.distributed.broadcast(message, group=group, group_src=0)


def _over_replicas(count: torch.Tensor) -> float:
    total = count.clone()
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return float(total.item())


def _check_key(microbatch: dict[str, Any], key: str) -> None:
    if key not in microbatch:
        raise LETError(
            f"The data loader gives no {key}, which --let-cross-tokenizer needs; wrap its datasets"
            " in data.token_alignment.TokenAlignedDataset, or use this package's entry."
        )


def _check_ids(tokens: torch.Tensor, teacher_vocab_size: int) -> None:
    largest = int(tokens.max())
    if largest >= teacher_vocab_size:
        raise LETError(
            f"The data has token id {largest} but the teacher's vocabulary has {teacher_vocab_size}"
            " ids; prepare the data with the teacher's tokenizer."
        )
