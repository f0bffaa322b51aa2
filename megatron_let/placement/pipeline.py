"""Order of the forward and backward passes in Megatron's pipeline schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron.core.pipeline_parallel.schedules import get_schedule_table


class Pass(NamedTuple):
    """One forward or backward pass of one microbatch through one model chunk of a stage."""

    kind: Literal["forward", "backward"]
    microbatch: int
    chunk: int = 0


@dataclass(frozen=True)
class Pipeline:
    """Sizes of a pipeline schedule.

    Attributes:
        num_stages: p, pipeline-parallel size.
        num_microbatches: n, per global batch and data-parallel replica.
        num_chunks: v, model chunks per stage; above 1 the schedule is the interleaved one.
        group_size: Megatron's `microbatch_group_size_per_vp_stage`; 0 for its default, p.
        overlap_p2p: Megatron's `overlap_p2p_comm` (interleaved schedule); without it a stage
            waits for its first gradient one forward earlier.
    """

    num_stages: int
    num_microbatches: int
    num_chunks: int = 1
    group_size: int = 0
    overlap_p2p: bool = True

    @property
    def group(self) -> int:
        """Return how many consecutive microbatches a chunk runs before the next chunk."""
        return self.group_size or self.num_stages

    def num_warmup(self, stage: int) -> int:
        """Return the forward passes before 1F1B (Megatron's `get_pp_rank_microbatches`)."""
        warmup = self.num_stages - stage - 1
        if self.num_chunks > 1:
            warmup = warmup * 2 + (self.num_chunks - 1) * self.group
        return min(warmup, self.num_microbatches * self.num_chunks)

    def num_forwards_to_wait(self, stage: int) -> int:
        """Return how many forward passes a stage runs before it waits for its first gradient."""
        waits_early = self.num_chunks > 1 and not self.overlap_p2p
        num_forwards = self.num_warmup(stage) + (0 if waits_early else 1)
        return min(num_forwards, self.num_microbatches * self.num_chunks)

    def passes(self, stage: int) -> list[Pass]:
        """Return all passes of one global batch on a stage, in execution order."""
        table = get_schedule_table(self.num_microbatches, self.num_chunks, self.group)
        forwards = [Pass("forward", microbatch, chunk) for microbatch, chunk in table]
        last = self.num_chunks - 1
        backwards = [Pass("backward", microbatch, last - chunk) for microbatch, chunk in table]
        warmup = self.num_warmup(stage)
        steady = [work for pair in zip(forwards[warmup:], backwards, strict=False) for work in pair]
        return forwards[:warmup] + steady + backwards[len(forwards) - warmup :]

    def num_in_flight(self, stage: int, chunk: int) -> int:
        """Return the most microbatches between forward and backward of one chunk at a time."""
        held = most = 0
        for work in self.passes(stage):
            if work.chunk == chunk:
                held += 1 if work.kind == "forward" else -1
                most = max(most, held)
        return most

    def producer(self, work: Pass, stage: int) -> tuple[int, Pass] | None:
        """Return the stage and pass whose output `work` on `stage` consumes; None at the ends.

        The backward of the last chunk on the last stage consumes the output of its own forward.
        """
        step = -1 if work.kind == "forward" else 1
        other, chunk = stage + step, work.chunk
        if not 0 <= other < self.num_stages:
            other, chunk = other % self.num_stages, chunk + step
        if 0 <= chunk < self.num_chunks:
            return other, Pass(work.kind, work.microbatch, chunk)
        if work.kind == "forward":
            return None
        return stage, Pass("forward", work.microbatch, work.chunk)
