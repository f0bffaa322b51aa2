"""Plan each step for the requested placement, with costs measured in the first steps."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_let.config.let_config import Placement
from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.plan import (
    FIXED_PLACEMENTS,
    Plan,
    fastest,
    num_computed_at_forward,
    plan,
    steady_timeline,
    step_time_ratio,
)
from megatron_let.placement.program import AlignedLayer
from megatron_let.placement.simulate import Costs

# The first step is slower than the others: it allocates memory and selects kernels.
_MEASURED_STEP = 1
# Backward over forward, by FLOPs; used if the last stage has no two consecutive forward passes.
_USUAL_RATIO = 2.0


@dataclass
class PassTimes:
    """Wall-clock times of one global batch on this stage, in seconds.

    Attributes:
        num_together: see `num_microbatches_together`.
        teacher: teacher forward on as many microbatches; 0 on a stage that ran none.
        forwards: start and end of each forward pass of the student.
    """

    device: torch.device
    num_together: int
    teacher: float = 0.0
    forwards: list[tuple[float, float]] = field(default_factory=list)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def time_teacher(self, work: Callable[[], None], num_microbatches: int) -> None:
        """Run and time `work`, the teacher forward on `num_microbatches` microbatches."""
        start = self._now()
        work()
        num_runs = math.ceil(num_microbatches / self.num_together)
        self.teacher = (self._now() - start) / max(1, num_runs)

    def time_forward(self, work: Callable[..., Any], *args: Any) -> Any:
        """Run and time one forward pass."""
        start = self._now()
        result = work(*args)
        self.forwards.append((start, self._now()))
        return result

    def forward(self) -> float:
        """Return the shortest time of a forward pass: others may contain the teacher's."""
        return min(end - start for start, end in self.forwards)

    def backward_ratio(self, num_warmup: int) -> float:
        """Estimate backward over forward from the gaps between forward passes after warm-up.

        Valid on the last stage, which does not wait for other stages in its steady state.
        """
        steady = self.forwards[num_warmup:]
        between = [after[0] - before[1] for before, after in itertools.pairwise(steady)]
        return min(between) / self.forward() if between else _USUAL_RATIO

    def costs(self, pipeline: Pipeline, stage: int) -> Costs:
        """Return the times of the slowest rank of each stage; the same on all ranks."""
        last = pipeline.num_stages - 1
        measured = torch.zeros(pipeline.num_stages + 2, device=self.device)
        measured[stage] = self.forward() * pipeline.num_chunks
        measured[-2] = self.teacher
        if stage == last:
            measured[-1] = self.backward_ratio(pipeline.num_warmup(last))
        torch.distributed.all_reduce(measured, op=torch.distributed.ReduceOp.MAX)
        *forward, teacher, ratio = measured.tolist()
        backward = tuple(ratio * seconds for seconds in forward)
        return Costs(tuple(forward), backward, teacher, num_together=self.num_together)


class PlacementScheduler:
    """Plans the teacher work of each step.

    `bubble` and `auto` need costs: their first steps run as `spread`, and one of them is timed.
    """

    def __init__(
        self,
        placement: Placement,
        max_prefetch: int | None,
        pipeline: Pipeline,
        aligned: AlignedLayer,
        num_together: int,
        report: Callable[[str], None],
    ) -> None:
        """Store the requested placement and the pipeline of the run.

        Args:
            placement: `--let-placement`.
            max_prefetch: states that the aligned stage may hold before their backward; None for
                all microbatches of the global batch.
            pipeline: pipeline of the run; its number of microbatches is ignored.
            aligned: stage and chunk of layer k.
            num_together: microbatches that the ranks of a stage run at once.
            report: prints one line on one rank.
        """
        self.placement, self._max_prefetch = placement, max_prefetch
        self._pipeline, self._aligned, self._report = pipeline, aligned, report
        self._num_together = num_together
        self._costs: Costs | None = None
        # By the number of microbatches; a simulation of a large pipeline takes seconds.
        self._fastest: dict[int, Placement] = {}
        self._step = 0

    @property
    def needs_teacher_everywhere(self) -> bool:
        """Return whether stages other than the aligned one run the teacher."""
        return self._pipeline.num_stages > 1 and self.placement != "aligned-stage"

    def max_prefetch(self, num_microbatches: int) -> int:
        """Return how many states the aligned stage may hold."""
        return min(self._max_prefetch or num_microbatches, num_microbatches)

    def max_states(self, num_microbatches: int) -> int:
        """Return the most states that the aligned stage holds at a time."""
        computed = num_computed_at_forward(
            self._sized(num_microbatches), self._aligned, self._num_together
        )
        return max(self.max_prefetch(num_microbatches), computed)

    def plan(self, num_microbatches: int, num_ready: int, look_ahead: bool) -> Plan:
        """Plan the work of one step; see `megatron_let.placement.plan.plan`."""
        pipeline = self._sized(num_microbatches)
        costs = self._costs or replace(
            Costs.uniform(pipeline.num_stages, 1, 1, 1), num_together=self._num_together
        )
        return plan(
            self._placement(pipeline),
            pipeline,
            costs,
            self._aligned,
            max_prefetch=self.max_prefetch(num_microbatches),
            num_ready=num_ready,
            look_ahead=look_ahead,
        )

    def timer(self, device: torch.device) -> PassTimes | None:
        """Return a timer if the coming step is to be measured."""
        wanted = self.needs_teacher_everywhere and self.placement in ("bubble", "auto")
        if not wanted or self._step != _MEASURED_STEP:
            return None
        return PassTimes(device, self._num_together)

    def end_step(self, timer: PassTimes | None, stage: int, num_microbatches: int) -> None:
        """Advance the step counter and store measured costs."""
        self._step += 1
        if timer is not None:
            pipeline = self._sized(num_microbatches)
            self._costs = timer.costs(pipeline, stage)
            self._fastest.clear()
            self._report(f"LET: {self._describe(pipeline, self._costs)}")

    def _sized(self, num_microbatches: int) -> Pipeline:
        return replace(self._pipeline, num_microbatches=num_microbatches)

    def _placement(self, pipeline: Pipeline) -> Placement:
        if pipeline.num_stages == 1:
            return "aligned-stage"
        if self.placement in ("aligned-stage", "spread"):
            return self.placement
        if self._costs is None:
            return "spread"
        if self.placement == "bubble":
            return "bubble"
        number, costs = pipeline.num_microbatches, self._costs
        if number not in self._fastest:
            limit = self.max_prefetch(number)
            self._fastest[number] = fastest(
                {
                    name: steady_timeline(name, pipeline, costs, self._aligned, limit).duration
                    for name in FIXED_PLACEMENTS
                }
            )
        return self._fastest[number]

    def _describe(self, pipeline: Pipeline, costs: Costs) -> str:
        placement = self._placement(pipeline)
        limit = self.max_prefetch(pipeline.num_microbatches)
        ratio = step_time_ratio(placement, pipeline, costs, self._aligned, limit)
        ahead = self.plan(pipeline.num_microbatches, 0, True).num_ahead
        forward = "/".join(f"{seconds * 1e3:.3g}" for seconds in costs.forward)
        backward = "/".join(f"{seconds * 1e3:.3g}" for seconds in costs.backward)
        teacher = f"{costs.teacher * 1e3:.3g}"
        if costs.num_together > 1:
            teacher += f" for {costs.num_together}"
        return (
            f"placement {placement} from the costs measured in ms per microbatch (stages forward"
            f" {forward}, backward {backward}, teacher {teacher}); {ahead} of"
            f" {pipeline.num_microbatches} microbatches one batch ahead; simulated step"
            f" {ratio:.3f} of one without a teacher"
        )
