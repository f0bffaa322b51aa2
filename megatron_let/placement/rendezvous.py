"""Check that a plan completes, also under rules of NCCL that gloo does not impose.

Under both, a message completes only when both ranks have posted it. In addition a rank may have to
wait for all of its messages: Megatron's pipeline communication ends in `torch.cuda.synchronize()`
unless `overlap_p2p_comm` is set or `batch_p2p_sync` is off, as it is while states are sent
(`transfer.py`). With a single hardware queue
(`CUDA_DEVICE_MAX_CONNECTIONS=1`), a message queued behind an unfinished one of the same pair blocks
everything that the rank launches later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.program import (
    AlignedLayer,
    Message,
    StagePlan,
    Step,
    last_messages,
    stage_program,
)


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
        _Rank(
            [s for s in stage_program(pipeline, aligned, stages, stage) if isinstance(s, Step)]
            + [Step("wait", last_messages(aligned, stages, stage))]
        )
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
