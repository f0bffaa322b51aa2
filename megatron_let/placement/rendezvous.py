"""Check that a plan completes under NCCL's rules, which gloo does not impose.

Under NCCL a message completes only when both ranks have posted it, and a rank may have to wait for
all of its messages: Megatron's pipeline communication ends in `torch.cuda.synchronize()` unless
`overlap_p2p_comm` is set (`p2p_communication.py`, `batch_p2p_sync`). With a single hardware queue
(`CUDA_DEVICE_MAX_CONNECTIONS=1`), a message queued behind an unfinished one of the same pair blocks
everything that the rank launches later.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megatron_let.placement.pipeline import Pass, Pipeline
from megatron_let.placement.simulate import AlignedLayer, StagePlan


class Message(NamedTuple):
    """Output of a pass, or a teacher state, on its way between two stages."""

    source: int
    target: int
    content: Pass | tuple[str, int]


class Step(NamedTuple):
    """Next action of a stage: post messages without waiting, wait for them, or both."""

    kind: Literal["post", "wait", "communicate"]
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Rules:
    """Waiting rules of a rank.

    Attributes:
        device_sync: pipeline communication waits for every message that the rank has posted.
        one_queue: the rank has one hardware queue.
    """

    device_sync: bool
    one_queue: bool


STRICTEST = Rules(device_sync=True, one_queue=True)


def plan_completes(
    pipeline: Pipeline,
    aligned: AlignedLayer,
    stages: Sequence[StagePlan],
    rules: Rules = STRICTEST,
) -> bool:
    """Return whether the messages of one global batch all complete."""
    ranks = [
        _Rank(list(_program(pipeline, aligned, stages, stage)))
        for stage in range(pipeline.num_stages)
    ]
    posted: Counter[Message] = Counter()
    # Lists, not generators: every rank advances in every round.
    while any([rank.advance(posted, rules) for rank in ranks]):
        pass
    return all(rank.is_complete for rank in ranks)


@dataclass
class _Rank:
    """A stage's position in its program, and the messages that it has posted."""

    program: list[Step]
    position: int = 0
    is_posted: bool = False
    outstanding: list[Message] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return self.position == len(self.program)

    def advance(self, posted: Counter[Message], rules: Rules) -> bool:
        """Run as many steps as possible; return whether anything changed."""
        changed = False
        while not self.is_complete:
            step = self.program[self.position]
            if step.kind != "wait" and not self.is_posted:
                if rules.one_queue and self._queue_is_blocked(posted):
                    break
                self._post(step.messages, posted)
                changed = True
            if step.kind != "post" and not self._is_done(step, posted, rules):
                break
            self.position, self.is_posted, changed = self.position + 1, False, True
        return changed

    def _post(self, messages: tuple[Message, ...], posted: Counter[Message]) -> None:
        self.is_posted = True
        self.outstanding = [m for m in self.outstanding if posted[m] < 2] + list(messages)
        for message in messages:
            # A state that its own stage uses needs no second rank.
            posted[message] += 2 if message.source == message.target else 1

    def _queue_is_blocked(self, posted: Counter[Message]) -> bool:
        """Return whether two unfinished messages of one pair fill the only queue."""
        pairs = [frozenset(m[:2]) for m in self.outstanding if posted[m] < 2]
        return len(pairs) > len(set(pairs))

    def _is_done(self, step: Step, posted: Counter[Message], rules: Rules) -> bool:
        syncs = rules.device_sync and step.kind == "communicate"
        return all(posted[m] == 2 for m in (self.outstanding if syncs else step.messages))


def _program(
    pipeline: Pipeline, aligned: AlignedLayer, stages: Sequence[StagePlan], stage: int
) -> Iterator[Step]:
    """Yield the messages of one stage in the order of `TeacherStateBuffer` and the schedule."""
    mine, is_aligned = stages[stage], stage == aligned.stage
    due = {m: s for s, plan in enumerate(stages) for m in (*plan.before, *plan.waiting)}
    ahead = {m: s for s, plan in enumerate(stages) for m in plan.after}
    if is_aligned:
        yield from _receives("state", due, stage)
    yield from _computed("state", mine.before, stage, aligned)
    num_forwards = 0
    for item in _schedule(pipeline, stage):
        if isinstance(item, Step):
            yield item
            continue
        if item.kind == "forward":
            num_forwards += 1
            if num_forwards == mine.num_forwards_to_wait:
                yield from _computed("state", mine.waiting, stage, aligned)
        elif AlignedLayer(stage, item.chunk) == aligned and item.microbatch in due:
            source = due[item.microbatch]
            yield Step("wait", (Message(source, stage, ("state", item.microbatch)),))
    if is_aligned:
        yield from _receives("ahead", ahead, stage)
    yield from _computed("ahead", mine.after, stage, aligned)
    # The next global batch begins with collectives over all stages.
    sources = ahead.items() if is_aligned else [(m, stage) for m in mine.after]
    yield Step("wait", tuple(Message(s, aligned.stage, ("ahead", m)) for m, s in sources))


def _receives(name: str, sources: dict[int, int], stage: int) -> Iterator[Step]:
    for microbatch, source in sorted(sources.items()):
        if source != stage:
            yield Step("post", (Message(source, stage, (name, microbatch)),))


def _computed(
    name: str, microbatches: tuple[int, ...], stage: int, aligned: AlignedLayer
) -> Iterator[Step]:
    for microbatch in microbatches:
        yield Step("post", (Message(stage, aligned.stage, (name, microbatch)),))


def _schedule(pipeline: Pipeline, stage: int) -> Iterator[Step | Pass]:
    """Yield the passes of a stage with Megatron's communication between them.

    A stage waits for each communication (`forward_backward_pipelining_*` without
    `overlap_p2p_comm`; with it, sends are not waited for, which can only complete earlier).
    """
    warmup = pipeline.num_warmup(stage)
    num_pairs = pipeline.num_microbatches * pipeline.num_chunks - warmup
    is_interleaved = pipeline.num_chunks > 1
    # Interleaved, one communication surrounds a forward and a backward.
    sizes = [1] * warmup + ([2] * num_pairs if is_interleaved else [1] * 2 * num_pairs)
    sizes += [1] * warmup
    steady = range(warmup + 1, warmup + 2 * num_pairs)
    passes = iter(pipeline.passes(stage))
    outputs: list[Message] = []
    for index, size in enumerate([*sizes, 0]):
        group = list(itertools.islice(passes, size))
        inputs = [message for work in group for message in _input(pipeline, work, stage)]
        if is_interleaved or index in steady:
            yield Step("communicate", (*outputs, *inputs))
        else:
            yield Step("communicate", tuple(outputs))
            yield Step("communicate", tuple(inputs))
        yield from group
        outputs = [message for work in group for message in _output(pipeline, work, stage)]


def _input(pipeline: Pipeline, work: Pass, stage: int) -> list[Message]:
    """Return the message that brings the input of a pass; none if this stage produces it."""
    producer = pipeline.producer(work, stage)
    if producer is None or producer[0] == stage:
        return []
    return [Message(producer[0], stage, producer[1])]


def _output(pipeline: Pipeline, work: Pass, stage: int) -> list[Message]:
    """Return the message that carries the output of a pass; none if this stage consumes it."""
    step = 1 if work.kind == "forward" else -1
    target, chunk = stage + step, work.chunk
    if not 0 <= target < pipeline.num_stages:
        target, chunk = target % pipeline.num_stages, chunk + step
    if target == stage or not 0 <= chunk < pipeline.num_chunks:
        return []
    return [Message(stage, target, work)]
