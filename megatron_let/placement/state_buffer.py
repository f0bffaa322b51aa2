"""Compute teacher states by plan and buffer them until their backward."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch

from megatron_let.placement.plan import Plan
from megatron_let.placement.program import StagePlan
from megatron_let.placement.sample_sharing import SampleSharing
from megatron_let.placement.transfer import Message, Transfer


@dataclass
class _Batch:
    """State of one global batch on this rank."""

    number: int
    tokens: torch.Tensor
    states: dict[int, Message] = field(default_factory=dict)
    sends: list[Message] = field(default_factory=list)
    not_finite: dict[int, torch.Tensor] = field(default_factory=dict)

    def tag(self, microbatch: int) -> int:
        # Messages of two consecutive global batches may be in flight at once.
        return 2 * microbatch + self.number % 2

    def finish(self) -> None:
        """Finish pending transfers."""
        for message in (*self.sends, *self.states.values()):
            message.wait()
        self.sends.clear()
        self.states.clear()


class TeacherStateBuffer:
    """Computes this stage's share of the states and, on the aligned stage, buffers all of them.

    Calls per global batch: `begin`, `before_schedule`; within the schedule, `before_forward` and
    `state` for each microbatch on the aligned stage and `after_forward` after each forward pass of
    any stage; then `after_backward` and `end`.
    """

    def __init__(
        self,
        samples: SampleSharing | None,
        transfer: Transfer | None,
        stage: int,
        aligned_stage: int,
        like: torch.Tensor,
        device: torch.device,
    ) -> None:
        """Store the source of states and the layout of the pipeline.

        Args:
            samples: computes a state; None on a stage that never runs the teacher.
            transfer: sends states to the aligned stage; None if no other stage runs the teacher.
            stage: pipeline stage of this rank.
            aligned_stage: pipeline stage of layer k.
            like: a tensor with the shape [s_local, b, d_T] and dtype of a state.
        """
        self._samples, self._transfer = samples, transfer
        self._stage, self._aligned_stage = stage, aligned_stage
        self._like, self._device = like, device
        self._plan: Plan | None = None
        self._batch: _Batch | None = None
        self._next: _Batch | None = None
        self._next_tokens: torch.Tensor | None = None
        self._num_forwards = 0
        self._number = 0

    @property
    def _is_aligned_stage(self) -> bool:
        return self._stage == self._aligned_stage

    @property
    def num_computed_ahead(self) -> int:
        """Return how many microbatches of the next global batch have a computed state."""
        return self._plan.num_ahead if self._plan is not None and self._next is not None else 0

    def begin(
        self,
        tokens: torch.Tensor,
        plan: Plan,
        next_tokens: torch.Tensor | None,
    ) -> None:
        """Begin a global batch.

        Args:
            tokens: [num_microbatches, b, s] int64.
            plan: plan of this batch; it omits the states that the previous batch computed ahead.
            next_tokens: [num_ahead, b, s], first tokens of the next batch; None if unknown.
        """
        sources = plan.sources()
        if len(sources) == len(tokens):
            self.forget_ahead()
        batch, self._next = self._next or self._new_batch(tokens), None
        batch.tokens = tokens
        self._batch, self._plan = batch, plan
        self._next_tokens = next_tokens
        self._num_forwards = 0
        self._receive(batch, sources)

    def before_schedule(self) -> None:
        """Compute the states planned before the schedule, whose first receive blocks."""
        self._compute(self._batch, self._mine.before)

    def before_forward(self, microbatch: int) -> None:
        """Compute the state of a microbatch if it is planned for its forward through layer k.

        If ranks of the stage would only repeat it, they compute those of the next microbatches.
        """
        planned = self._mine.at_forward
        assert self._batch is not None, "before_forward() outside a global batch"
        if microbatch in planned and microbatch not in self._batch.states:
            first = planned.index(microbatch)
            self._compute(self._batch, planned[first : first + self._num_together])

    def after_forward(self) -> None:
        """Count a forward pass of this stage; compute the states planned for its idle wait."""
        self._num_forwards += 1
        if self._num_forwards == self._mine.num_forwards_to_wait:
            self._compute(self._batch, self._mine.waiting)

    def after_backward(self) -> None:
        """Compute this stage's states of the next global batch, while other stages finish."""
        assert self._plan is not None, "after_backward() outside a global batch"
        if self._next_tokens is None or self._plan.num_ahead == 0:
            return
        self._next = self._new_batch(self._next_tokens)
        self._next_tokens = None
        self._receive(self._next, self._plan.sources_ahead())
        self._compute(self._next, self._mine.after)

    def state(self, microbatch: int) -> torch.Tensor:
        """Return the state [s_local, b, d_T] of this rank's tokens; zeros if it had NaN or Inf.

        Called once per microbatch, in order, in the backward pass of layer k.
        """
        assert self._batch is not None, "state() outside a global batch"
        return self._batch.states.pop(microbatch).wait()

    def end(self) -> torch.Tensor:
        """End the global batch; return [num_microbatches], 1 where this rank had NaN or Inf."""
        batch, self._batch = self._batch, None
        assert batch is not None, "end() outside a global batch"
        batch.finish()
        flags = torch.zeros(len(batch.tokens), device=batch.tokens.device)
        for microbatch, failed in batch.not_finite.items():
            flags[microbatch] = failed
        return flags

    def close(self) -> None:
        """Finish pending transfers and destroy their process group."""
        self.forget_ahead()
        if self._transfer is not None:
            self._transfer.close()

    def _new_batch(self, tokens: torch.Tensor) -> _Batch:
        self._number += 1
        return _Batch(self._number, tokens)

    @property
    def _mine(self) -> StagePlan:
        assert self._plan is not None, "begin() was not called"
        return self._plan.stages[self._stage]

    def _compute(self, batch: _Batch | None, microbatches: tuple[int, ...]) -> None:
        assert batch is not None, "work outside a global batch"
        for some in itertools.batched(microbatches, self._num_together):
            assert self._samples is not None, "the plan assigns work to a stage without a teacher"
            tokens = torch.stack([batch.tokens[microbatch] for microbatch in some])
            states, not_finite = self._samples.states(tokens)
            batch.not_finite.update(zip(some, not_finite, strict=True))
            for microbatch, state in zip(some, states, strict=True):
                self._keep(batch, microbatch, state)

    def _keep(self, batch: _Batch, microbatch: int, state: torch.Tensor) -> None:
        """Buffer a computed state on the aligned stage, or start sending it there."""
        if self._is_aligned_stage:
            batch.states[microbatch] = Message(state, None)
        else:
            assert self._transfer is not None
            batch.sends.append(self._transfer.send(state, batch.tag(microbatch)))

    @property
    def _num_together(self) -> int:
        """Return how many microbatches the ranks of the stage run at a time."""
        return 1 if self._samples is None else self._samples.num_together(self._like.shape[1])

    def _receive(self, batch: _Batch, sources: dict[int, int]) -> None:
        """Start all receives of the aligned stage, in the order in which the states are due.

        No receive is posted within the schedule, whose communication may wait for all messages
        of a rank (see rendezvous.py).
        """
        others = [item for item in sorted(sources.items()) if item[1] != self._stage]
        for microbatch, stage in others if self._is_aligned_stage else ():
            assert self._transfer is not None, "a state from another stage needs a transfer"
            buffer, tag = torch.empty_like(self._like, device=self._device), batch.tag(microbatch)
            batch.states[microbatch] = self._transfer.receive(buffer, stage, tag)

    def forget_ahead(self) -> None:
        """Drop the states that were computed for the next global batch."""
        if self._next is not None:
            self._next.finish()
            self._next = None
