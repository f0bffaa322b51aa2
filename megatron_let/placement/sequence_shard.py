"""Which tokens of a sequence a rank holds, and how much weight its gradient carries.

Pure functions over sizes and ranks: no process group is touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SequenceShard:
    """One rank's share of the sequence dimension of a hidden state.

    Attributes:
        cp_size, cp_rank: context parallelism; rank r holds the chunks r and 2*cp-1-r of 2*cp.
        sp_size, sp_rank: sequence parallelism (1, 0 where it is off); contiguous chunks of what
            context parallelism left.
    """

    cp_size: int = 1
    cp_rank: int = 0
    sp_size: int = 1
    sp_rank: int = 0

    def ranges(self, length: int) -> list[tuple[int, int]]:
        """Half-open ranges of global positions that this rank holds, in its own order.

        Args:
            length: s, tokens in the whole sequence.

        Raises:
            ValueError: the sequence does not divide.
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
        """Tokens of a sequence of this length that the rank holds."""
        return sum(end - start for start, end in self.ranges(length))

    def slice(self, states: torch.Tensor) -> torch.Tensor:
        """[s, b, d] of the whole sequence -> [s / cp / sp, b, d] of this rank."""
        parts = [states[start:end] for start, end in self.ranges(states.shape[0])]
        # A copy where anything is cut away, so that the whole sequence can be freed.
        return torch.cat(parts) if sum(len(p) for p in parts) < len(states) else states


def gradient_denominator(
    micro_batch_size: int, sequence_length: int, cp_size: int, num_microbatches: int
) -> int:
    """Tokens over which a rank's sum of cosines is a mean, in Megatron's default loss mode.

    Megatron divides each microbatch's loss by the number of microbatches and averages gradients
    over the DP x CP ranks, so no factor of either enters; tensor-parallel ranks sum or repeat the
    gradient by themselves, so none of TP enters.
    """
    return micro_batch_size * (sequence_length // cp_size) * num_microbatches


def per_token_gradient_factor(unmasked_tokens: float, all_tokens: int) -> float:
    """Factor of the gradient under `--calculate-per-token-loss`.

    Megatron divides the summed gradient by the unmasked tokens of the global batch; the alignment
    is a mean over all of them (equations 1 and 7 both sum over tokens).
    """
    return unmasked_tokens / all_tokens
