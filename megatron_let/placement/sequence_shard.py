"""Tokens of a sequence that a rank holds under context and sequence parallelism. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SequenceShard:
    """One rank's share of the sequence dimension of a hidden state.

    Attributes:
        cp_size, cp_rank: context parallelism; rank r holds chunks r and 2*cp-1-r of 2*cp.
        sp_size, sp_rank: sequence parallelism (1, 0 if off); contiguous chunks of the
            context-parallel share.
    """

    cp_size: int = 1
    cp_rank: int = 0
    sp_size: int = 1
    sp_rank: int = 0

    def ranges(self, length: int) -> list[tuple[int, int]]:
        """Return the half-open ranges of global positions that this rank holds, in local order.

        Args:
            length: s, tokens in the whole sequence.

        Raises:
            ValueError: the sequence is not divisible.
        """
        chunks = self.cp_size * (2 if self.cp_size > 1 else 1)
        if length % chunks or (length // self.cp_size) % self.sp_size:
            raise ValueError(
                f"A sequence of {length} tokens does not divide over context parallel size "
                f"{self.cp_size} and sequence parallel size {self.sp_size}; change --seq-length."
            )
        chunk = length // chunks
        held = [self.cp_rank, chunks - 1 - self.cp_rank] if self.cp_size > 1 else [0]
        local = length // self.cp_size // self.sp_size
        first, last = self.sp_rank * local, (self.sp_rank + 1) * local
        ranges = []
        for slot, index in enumerate(held):
            start, end = max(first, slot * chunk), min(last, (slot + 1) * chunk)
            if start < end:
                offset = index * chunk - slot * chunk
                ranges.append((start + offset, end + offset))
        return ranges

    def num_local(self, length: int) -> int:
        """Return how many tokens of a sequence of this length the rank holds."""
        return sum(end - start for start, end in self.ranges(length))

    def slice(self, states: torch.Tensor) -> torch.Tensor:
        """Slice [s, b, d] of the whole sequence to [s / cp / sp, b, d] of this rank."""
        parts = [states[start:end] for start, end in self.ranges(states.shape[0])]
        # A copy if anything is cut off, so that the whole sequence can be freed.
        return torch.cat(parts) if sum(len(p) for p in parts) < len(states) else states
