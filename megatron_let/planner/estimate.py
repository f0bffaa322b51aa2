"""One layout's memory and step time, with and without a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_let.config.let_config import Placement
from megatron_let.placement.choose import steady_timeline
from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.plan import FIXED_PLACEMENTS, samples_split
from megatron_let.placement.simulate import AlignedLayer, Costs, simulate
from megatron_let.planner.memory import (
    Layout,
    StageMemory,
    pass_work,
    stage_memory,
    teacher_state,
    teacher_weights,
    teacher_work,
)
from megatron_let.planner.sizes import TransformerSize

# Microbatches a stage from which on a longer global batch only repeats its steady state.
_LONG = 8


@dataclass(frozen=True)
class Gpu:
    """A GPU and what joins it to others.

    Attributes:
        memory: bytes that the driver offers.
        flops: dense bf16 operations a second, as its maker says.
        link: bytes a second within a node, one way.
        network: bytes a second between nodes, of one GPU.
        pcie: bytes a second to the host's memory, one way.
        host_memory: bytes a second that one rank's process reads and writes of it.
    """

    memory: int
    flops: float
    link: float
    network: float
    pcie: float = 25e9
    host_memory: float = 50e9


GPUS = {
    "a100-40g": Gpu(int(39.4 * 2**30), 312e12, 300e9, 25e9),
    "a100-80g": Gpu(int(79.1 * 2**30), 312e12, 300e9, 25e9),
    "h100-80g": Gpu(int(79.1 * 2**30), 989e12, 450e9, 50e9, pcie=50e9),
    "h200-141g": Gpu(int(139.8 * 2**30), 989e12, 450e9, 50e9, pcie=50e9),
}


@dataclass(frozen=True)
class Request:
    """What does not change between the layouts of a sweep.

    Attributes:
        student: its vocabulary padded.
        teacher: None for a run without one.
        layer: k.
        seq_length: s.
        gpu: every rank's.
        efficiency: share of the GPU's FLOPs that matrix products reach.
        max_prefetch: states that the owner may hold; None for those of a global batch.
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
        """States that the owner may hold."""
        return min(self.max_prefetch or layout.num_microbatches, layout.num_microbatches)


@dataclass(frozen=True)
class Estimate:
    """What a layout costs.

    Attributes:
        memory: of each stage, with the teacher in its best placement.
        baseline_seconds: of one step's passes without a teacher.
        seconds: of one step's passes, by placement; empty without a teacher.
        placement: the best one.
        costs: of one microbatch, that the times come from.
        owner: of layer k.
        fits: every stage leaves the reserve free.
    """

    layout: Layout
    memory: tuple[StageMemory, ...]
    baseline_seconds: float
    seconds: dict[Placement, float]
    placement: Placement | None
    costs: Costs
    owner: AlignedLayer
    fits: bool

    @property
    def best_seconds(self) -> float:
        """Of one step's passes in the best placement."""
        return self.seconds[self.placement] if self.placement else self.baseline_seconds

    @property
    def peak(self) -> StageMemory:
        """The fullest stage."""
        return max(self.memory, key=lambda stage: stage.total)


def owner_of(layer: int, num_layers: int, layout: Layout) -> AlignedLayer:
    """Stage and chunk of a 1-based layer, the layers cut evenly."""
    chunk = (layer - 1) // (num_layers // layout.pp // layout.num_chunks)
    return AlignedLayer(chunk % layout.pp, chunk // layout.pp)


def estimate(request: Request, layout: Layout) -> Estimate:
    """Memory and times of a layout whose sizes divide."""
    owner = owner_of(request.layer, request.student.num_layers, layout)
    costs = stage_costs(request, layout)
    baseline = _in_long_batches(
        layout.pipeline, lambda pipeline: simulate(pipeline, costs, owner).duration
    )
    seconds: dict[Placement, float] = {}
    placement: Placement | None = None
    if request.teacher is not None:
        seconds = {name: _seconds(name, request, layout, costs, owner) for name in FIXED_PLACEMENTS}
        placement = _best(seconds)
    memory = tuple(_memory(request, layout, stage, owner, placement) for stage in range(layout.pp))
    return Estimate(
        layout, memory, baseline, seconds, placement, costs, owner, fits(request, layout, placement)
    )


def fits(request: Request, layout: Layout, placement: Placement | None = "aligned-stage") -> bool:
    """Whether every stage leaves the reserve free."""
    owner = owner_of(request.layer, request.student.num_layers, layout)
    limit = request.gpu.memory * (1 - request.reserve)
    stages = range(layout.pp)
    return all(_memory(request, layout, s, owner, placement).total <= limit for s in stages)


def _best(seconds: dict[Placement, float]) -> Placement:
    """The fastest; of those within 0.1 % the one with the least memory."""
    limit = min(seconds.values()) * 1.001
    return next(name for name in FIXED_PLACEMENTS if seconds[name] <= limit)


def _seconds(
    placement: Placement, request: Request, layout: Layout, costs: Costs, owner: AlignedLayer
) -> float:
    """Of one step's passes under a placement."""

    def simulated(pipeline: Pipeline) -> float:
        prefetch = min(request.prefetch(layout), pipeline.num_microbatches)
        return steady_timeline(placement, pipeline, costs, owner, prefetch).duration

    return _in_long_batches(layout.pipeline, simulated)


def _in_long_batches(pipeline: Pipeline, duration: Callable[[Pipeline], float]) -> float:
    """`duration`, by its slope where the global batch is long: its middle repeats itself."""
    unit = _LONG * pipeline.num_stages
    if pipeline.num_microbatches <= 2 * unit:
        return duration(pipeline)
    short, long = (duration(replace(pipeline, num_microbatches=n)) for n in (unit, 2 * unit))
    return short + (long - short) * (pipeline.num_microbatches - unit) / unit


def stage_costs(request: Request, layout: Layout) -> Costs:
    """Seconds of one microbatch on each stage, from FLOPs and bytes.

    Matrix products run at `efficiency`; a tensor-parallel layer exchanges its activations four
    times a pass, not overlapped; the backward is two forwards, and three with recomputation.
    """
    student, seq_length = request.student, request.seq_length
    tokens = layout.micro_batch_size * seq_length / layout.cp
    speed = request.gpu.flops * request.efficiency
    layers = student.num_layers // layout.pp
    activation = 2 * tokens * student.hidden_size
    exchange = layers * 4 * activation * (layout.tp - 1) / layout.tp / request.gpu.link
    compute = tokens * layers * student.layer_forward_flops(seq_length) / layout.tp / speed
    head = tokens * student.logits_forward_flops / layout.tp / speed
    recomputed = {"none": 0.0, "full": 1.0}.get(layout.recompute, layout.recompute_layers / layers)
    forward = [compute + exchange] * layout.pp
    backward = [2 * (compute + exchange) + recomputed * (compute + exchange)] * layout.pp
    forward[-1] += head
    backward[-1] += 2 * head
    return Costs(
        tuple(forward),
        tuple(backward),
        teacher=_teacher_seconds(request, layout, speed),
        transfer=activation / layout.tp / request.gpu.network if layout.pp > 1 else 0.0,
    )


def _teacher_seconds(request: Request, layout: Layout, speed: float) -> float:
    if request.teacher is None:
        return 0.0
    split = samples_split(layout.tp, layout.cp, layout.micro_batch_size)
    tokens = layout.micro_batch_size * request.seq_length / split
    return tokens * request.teacher.forward_flops(request.seq_length, logits=False) / speed


def _memory(
    request: Request, layout: Layout, stage: int, owner: AlignedLayer, placement: Placement | None
) -> StageMemory:
    student = stage_memory(request.student, layout, request.seq_length, stage)
    if request.teacher is None or (placement == "aligned-stage" and stage != owner.stage):
        return student
    split = samples_split(layout.tp, layout.cp, layout.micro_batch_size)
    samples = layout.micro_batch_size // split
    held = 1
    if stage == owner.stage:
        in_flight = layout.pp - stage
        held = in_flight if placement == "aligned-stage" else request.prefetch(layout)
    state = teacher_state(request.teacher, layout, request.seq_length)
    work = teacher_work(request.teacher, samples, request.seq_length)
    # The teacher runs before a forward or a first backward, when these are not there.
    not_then = pass_work(request.student, layout, request.seq_length, stage)
    return replace(
        student,
        teacher_weights=teacher_weights(request.teacher),
        teacher_buffers=held * state + max(0, work - not_then),
    )


def share_of_training(request: Request) -> float:
    """Teacher's forward FLOPs over the student's training FLOPs (three forwards) of a token."""
    if request.teacher is None:
        return 0.0
    student = request.student.forward_flops(request.seq_length, logits=True)
    return request.teacher.forward_flops(request.seq_length, logits=False) / (3 * student)
