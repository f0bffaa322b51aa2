"""When a stage computes states, and how many the aligned stage holds."""

from __future__ import annotations

from typing import Any

import torch

from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.plan import Plan
from megatron_let.placement.program import AlignedLayer, StagePlan, TeacherRun, stage_program
from megatron_let.placement.state_buffer import TeacherStateBuffer
from megatron_let.placement.transfer import Message

NUM_MICROBATCHES = 6
TOKENS = torch.arange(NUM_MICROBATCHES)[:, None, None].expand(-1, 2, 3)
NEXT_TOKENS = TOKENS[:2] + 100


class Samples:
    """The state of a microbatch is its first token; microbatch 3 counts as not finite.

    Attributes:
        computed: microbatches in the order of their computation.
        calls: how many of them each call computed.
    """

    def __init__(self, num_together: int = 1) -> None:
        self.computed: list[int] = []
        self.calls: list[int] = []
        self._num_together = num_together

    def num_together(self, micro_batch_size: int) -> int:
        assert micro_batch_size == 2
        return self._num_together

    def states(self, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        numbers = tokens[:, 0, 0]
        self.computed += numbers.tolist()
        self.calls.append(len(numbers))
        return [torch.full((3, 2, 4), float(n)) for n in numbers], (numbers == 3).float()


class Mail:
    """A transfer that delivers immediately and records what the aligned stage received."""

    def __init__(self) -> None:
        self.sent: dict[int, torch.Tensor] = {}
        self.asked: list[int] = []

    def send(self, state: torch.Tensor, tag: int) -> Message:
        self.sent[tag] = state
        return Message(state, None)

    def receive(self, buffer: torch.Tensor, stage: int, tag: int) -> Message:
        self.asked.append(tag // 2)
        return Message(buffer.copy_(self.sent[tag]), None)


def states(stage: int, samples: Samples, mail: Mail) -> TeacherStateBuffer:
    like, anything = torch.empty(3, 2, 4, device="meta"), (samples, mail)
    given: Any = anything
    return TeacherStateBuffer(given[0], given[1], stage, 0, like, torch.device("cpu"))


PLAN = Plan(
    (
        StagePlan(waiting=(3,), at_forward=(4, 5), num_forwards_to_wait=2),
        StagePlan(before=(0, 1, 2), after=(0, 1)),
    ),
)


def test_states_are_computed_in_their_slot_and_received_before_the_schedule() -> None:
    mail, first, second = Mail(), Samples(), Samples()
    helper, aligned = states(1, second, mail), states(0, first, mail)
    helper.begin(TOKENS, PLAN, NEXT_TOKENS)
    helper.before_schedule()
    assert second.computed == [0, 1, 2]
    aligned.begin(TOKENS, PLAN, NEXT_TOKENS)
    assert mail.asked == [0, 1, 2]
    aligned.before_schedule()
    aligned.after_forward()
    assert first.computed == []
    aligned.after_forward()
    assert first.computed == [3]
    for microbatch in range(NUM_MICROBATCHES):
        aligned.before_forward(microbatch)
        assert aligned.state(microbatch).eq(microbatch).all()
    assert mail.asked == [0, 1, 2] and first.computed == [3, 4, 5]
    helper.after_backward()
    assert second.computed[-2:] == [100, 101]
    aligned.after_backward()
    assert aligned.num_computed_ahead == helper.num_computed_ahead == 2
    assert aligned.end().tolist() == [0, 0, 0, 1, 0, 0]


def test_states_computed_ahead_are_used_by_next_batch_or_dropped() -> None:
    mail, samples = Mail(), Samples()
    helper, aligned = states(1, samples, mail), states(0, Samples(), mail)
    for one in (helper, aligned):
        one.begin(TOKENS, PLAN, NEXT_TOKENS)
        one.before_schedule()
        one.after_forward()
        one.after_backward()
        one.end()
    later = Plan((StagePlan(at_forward=(2, 3, 4, 5)), StagePlan()))
    aligned.begin(TOKENS + 100, later, None)
    assert aligned.state(0).eq(100).all() and aligned.state(1).eq(101).all()
    aligned.after_backward()
    assert aligned.num_computed_ahead == 0
    # The same batch again (a replayed step): states of the next batch must not be used.
    helper.begin(TOKENS, PLAN, NEXT_TOKENS)
    helper.before_schedule()
    assert samples.computed[-3:] == [0, 1, 2]


def test_ranks_that_would_repeat_work_compute_the_next_microbatches() -> None:
    mail, first, second = Mail(), Samples(num_together=2), Samples(num_together=2)
    helper, aligned = states(1, second, mail), states(0, first, mail)
    for one in (helper, aligned):
        one.begin(TOKENS, PLAN, NEXT_TOKENS)
        one.before_schedule()
    assert second.computed == [0, 1, 2] and second.calls == [2, 1]
    for microbatch in range(NUM_MICROBATCHES):
        aligned.before_forward(microbatch)
        aligned.after_forward()
        assert aligned.state(microbatch).eq(microbatch).all()
    assert first.computed == [3, 4, 5] and first.calls == [1, 2]
    assert aligned.end().tolist() == [0, 0, 0, 1, 0, 0]
    helper.after_backward()
    assert second.computed[3:] == [100, 101] and second.calls == [2, 1, 2]
    # The simulation has the same runs.
    for stage, samples in enumerate((first, second)):
        program = stage_program(Pipeline(2, 6), AlignedLayer(0), PLAN.stages, stage, 2)
        runs = [item for item in program if isinstance(item, TeacherRun)]
        assert [len(run.microbatches) for run in runs] == samples.calls
