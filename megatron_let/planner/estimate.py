"""Memory and step time of one layout, with and without a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_let.config.let_config import Placement
from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.plan import (
    FIXED_PLACEMENTS,
    fastest,
    num_computed_at_forward,
    num_microbatches_together,
    steady_timeline,
)
from megatron_let.placement.program import AlignedLayer
from megatron_let.placement.simulate import Costs, simulate
from megatron_let.planner.communication import (
    activation_transfer,
    exposed_reduction,
    layer_exchange,
    state_transfer,
)
from megatron_let.planner.memory import (
    Layout,
    StageMemory,
    pass_work,
    stage_memory,
    teacher_state,
    teacher_weights,
    teacher_work,
)
from megatron_let.planner.sizes import Gpu, TransformerSize

# Microbatches per stage after which a longer global batch only repeats the steady state.
_LONG = 8


@dataclass(frozen=True)
class Request:
    """Settings shared by all layouts.

    Attributes:
        student: sizes, with a padded vocabulary.
        teacher: sizes; None for a run without a teacher.
        layer: k, 1-based.
        seq_length: s.
        gpu: GPU type of every rank.
        efficiency: share of the GPU's FLOP/s that matrix products reach.
        max_prefetch: teacher states that the aligned stage may hold; None for a global batch.
        reserve: share of the GPU's memory to leave free.
    """

    student: TransformerSize
    teacher: TransformerSize | None
    layer: int
    seq_length: int
    gpu: Gpu
    efficiency: float = 0.5
    max_prefetch: int | None = None
    reserve: float = 0.1

    def prefetch(self, layout: Layout) -> int:
        """Return the number of teacher states that the aligned stage may hold."""
        return min(self.max_prefetch or layout.num_microbatches, layout.num_microbatches)

    def fits(self, memory: tuple[StageMemory, ...]) -> bool:
        """Return whether every stage leaves the reserve free."""
        limit = self.gpu.memory * (1 - self.reserve)
        return all(stage.total <= limit for stage in memory)

    @property
    def flops(self) -> float:
        """Return the FLOP/s that matrix products reach."""
        return self.gpu.flops * self.efficiency

    @property
    def teacher_flops(self) -> float:
        """Return the FLOP/s that the teacher's matrix products reach."""
        is_fp32 = self.teacher is not None and self.teacher.num_bytes == 4
        return (self.gpu.fp32_flops if is_fp32 else self.gpu.flops) * self.efficiency

    @property
    def teacher_share(self) -> float:
        """Return teacher forward FLOPs over student training FLOPs (3 forwards), per token."""
        if self.teacher is None:
            return 0.0
        student = self.student.forward_flops(self.seq_length, logits=True)
        return self.teacher.forward_flops(self.seq_length, logits=False) / (3 * student)


@dataclass(frozen=True)
class Estimate:
    """Memory and step time of a layout.

    Attributes:
        memory: memory of each stage, with the teacher in its best placement.
        baseline_seconds: passes of one step without a teacher.
        seconds: passes of one step by placement; empty without a teacher.
        placement: the best placement.
        costs: costs per microbatch; the times are simulated from them.
        aligned: stage and chunk of layer k.
        details: further JSON values, of experts or under DeepSpeed.
    """

    request: Request
    layout: Layout
    memory: tuple[StageMemory, ...]
    baseline_seconds: float
    seconds: dict[Placement, float]
    placement: Placement | None
    costs: Costs
    aligned: AlignedLayer
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def best_seconds(self) -> float:
        """Return the seconds of one step's passes in the best placement."""
        return self.seconds[self.placement] if self.placement else self.baseline_seconds

    @property
    def tokens_per_second(self) -> float:
        """Return the training throughput of the whole run in the best placement."""
        layout = self.layout
        samples = layout.micro_batch_size * layout.num_microbatches * layout.dp
        return samples * self.request.seq_length / self.best_seconds

    @property
    def peak(self) -> StageMemory:
        """Return the memory of the fullest stage."""
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        """Return whether every stage leaves the reserve free."""
        return self.request.fits(self.memory)


def aligned_layer(layer: int, num_layers: int, layout: Layout) -> AlignedLayer:
    """Return stage and chunk of a 1-based layer under an even split."""
    chunk = (layer - 1) // (num_layers // layout.pp // layout.num_chunks)
    return AlignedLayer(chunk % layout.pp, chunk // layout.pp)


def estimate(request: Request, layout: Layout) -> Estimate:
    """Predict memory and times of a layout whose sizes divide."""
    aligned = aligned_layer(request.layer, request.student.num_layers, layout)
    costs = stage_costs(request, layout)
    baseline = _seconds(None, request, layout, costs, aligned)
    seconds: dict[Placement, float] = {}
    placement: Placement | None = None
    if request.teacher is not None:
        seconds = {
            name: _seconds(name, request, layout, costs, aligned) for name in FIXED_PLACEMENTS
        }
        placement = fastest(seconds)
    memory = memory_of_stages(request, layout, placement)
    details = expert_details(request.student)
    return Estimate(request, layout, memory, baseline, seconds, placement, costs, aligned, details)


def expert_details(student: TransformerSize) -> dict[str, Any]:
    """Return parameters and assumptions of a mixture of experts, as JSON values; {} if dense."""
    if student.experts is None:
        return {}
    return {
        "parameters": student.num_params,
        "active_parameters": student.num_active_params,
        "assumptions": [
            "every expert gets equally many tokens; a fuller expert needs more memory and time",
            "experts in one grouped product keep what experts one after another keep",
        ],
    }


def _seconds(
    placement: Placement | None,
    request: Request,
    layout: Layout,
    costs: Costs,
    aligned: AlignedLayer,
) -> float:
    """Simulate the passes of one step, without a teacher or with it under a placement."""

    def simulated(pipeline: Pipeline) -> float:
        if placement is None:
            return simulate(pipeline, costs, aligned).duration
        prefetch = min(request.prefetch(layout), pipeline.num_microbatches)
        return steady_timeline(placement, pipeline, costs, aligned, prefetch).duration

    return _in_long_batches(layout.pipeline, simulated)


def _in_long_batches(pipeline: Pipeline, duration: Callable[[Pipeline], float]) -> float:
    """Evaluate `duration`; extrapolate a long global batch, whose steady state repeats."""
    unit = _LONG * pipeline.num_stages
    if pipeline.num_microbatches <= 2 * unit:
        return duration(pipeline)
    short, long = (duration(replace(pipeline, num_microbatches=n)) for n in (unit, 2 * unit))
    return short + (long - short) * (pipeline.num_microbatches - unit) / unit


def stage_costs(request: Request, layout: Layout) -> Costs:
    """Return seconds per microbatch and stage, from FLOPs and bytes.

    Matrix products run at `efficiency`. The backward costs two forwards, three with recomputation.
    """
    student, seq_length = request.student, request.seq_length
    tokens = layout.micro_batch_size * seq_length / layout.cp
    layers = student.num_layers // layout.pp
    exchange = layers * layer_exchange(student, layout, seq_length, request.gpu)
    compute = tokens * layers * student.layer_forward_flops(seq_length) / layout.tp / request.flops
    head = tokens * student.logits_forward_flops / layout.tp / request.flops
    block = min(layout.recompute_layers * layout.num_chunks / layers, 1.0)
    recomputed = {"none": 0.0, "full": 1.0}.get(layout.recompute, block)
    forward = [compute + exchange] * layout.pp
    backward = [2 * (compute + exchange) + recomputed * (compute + exchange)] * layout.pp
    forward[-1] += head
    backward[-1] += 2 * head
    return Costs(
        tuple(forward),
        tuple(backward),
        teacher=_teacher_seconds(request, layout),
        num_together=_num_together(layout),
        transfer=activation_transfer(student, layout, seq_length, request.gpu),
        state_transfer=state_transfer(request.teacher, layout, seq_length, request.gpu),
        reduce=exposed_reduction(student, layout, request.gpu, forward, backward),
    )


def _teacher_seconds(request: Request, layout: Layout) -> float:
    """Return the time of one rank's samples of one microbatch; other ranks run the others'."""
    if request.teacher is None:
        return 0.0
    tokens = _samples_of_rank(layout) * request.seq_length
    flops = request.teacher.forward_flops(request.seq_length, logits=False)
    return tokens * flops / request.teacher_flops


def _num_together(layout: Layout) -> int:
    return num_microbatches_together(layout.tp * layout.cp, layout.micro_batch_size)


def _samples_of_rank(layout: Layout) -> int:
    """Return the samples of one rank in a forward of the teacher."""
    return _num_together(layout) * layout.micro_batch_size // (layout.tp * layout.cp)


def memory_of_stages(
    request: Request, layout: Layout, placement: Placement | None
) -> tuple[StageMemory, ...]:
    """Return the memory of one rank of each stage."""
    aligned = aligned_layer(request.layer, request.student.num_layers, layout)
    return tuple(_memory(request, layout, stage, aligned, placement) for stage in range(layout.pp))


def _memory(
    request: Request, layout: Layout, stage: int, aligned: AlignedLayer, placement: Placement | None
) -> StageMemory:
    student = stage_memory(request.student, layout, request.seq_length, stage)
    if request.teacher is None or (placement == "aligned-stage" and stage != aligned.stage):
        return student
    held = 1
    if stage == aligned.stage:
        # A state is held from its microbatch's forward to its backward, or from the start.
        held = num_computed_at_forward(layout.pipeline, aligned, _num_together(layout))
        held = held if placement == "aligned-stage" else max(held, request.prefetch(layout))
    state = teacher_state(request.teacher, layout, request.seq_length)
    work = teacher_work(request.teacher, _samples_of_rank(layout), request.seq_length)
    # The teacher runs before a forward or a first backward, when the pass's work is not allocated.
    unallocated = pass_work(request.student, layout, request.seq_length, stage)
    return replace(
        student,
        teacher_weights=teacher_weights(request.teacher),
        teacher_buffers=held * state + max(0, work - unallocated),
    )
