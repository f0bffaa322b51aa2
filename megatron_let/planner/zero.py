"""Memory and step time of one rank under DeepSpeed's ZeRO, from its config, without DeepSpeed.

It counts what DeepSpeed 0.19.8 allocates for bf16 parameters and fp32 master weights. From stage 1
on, gradients are accumulated and reduced in fp32, as the engine's configs set it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_let.config.let_config import Placement
from megatron_let.errors import LETError
from megatron_let.placement.plan import samples_split
from megatron_let.placement.simulate import AlignedLayer, Costs
from megatron_let.planner.estimate import Estimate, Request, stage_costs
from megatron_let.planner.memory import (
    Layout,
    StageMemory,
    activations,
    stage_params,
    teacher_state,
    teacher_weights,
    teacher_work,
)
from megatron_let.planner.sizes import Gpu, TransformerSize

_BF16 = 2
_FP32 = 4
_MOMENTS = 2 * _FP32
_GPUS_PER_NODE = 8
# Parameters per optimizer step of ZeRO-3, DeepSpeed's `sub_group_size`.
_SUB_GROUP = 1_000_000_000
# Bytes per parameter of DeepSpeed's CPU Adam: it reads four fp32, writes three fp32 and a bf16.
_ADAM_TRAFFIC = 7 * _FP32 + _BF16


@dataclass(frozen=True)
class Zero:
    """The settings of a DeepSpeed config that memory and time depend on; names are DeepSpeed's.

    Attributes:
        stage: 0 to 3.
        offload_optimizer, offload_param: whether they are in host memory.
        pin_memory: the optimizer's host buffers are pinned, with sizes rounded to powers of two.
        reduce_bucket_size: elements of the gradient bucket.
        max_live_parameters: elements that ZeRO-3 keeps gathered at most.
        overlap_comm: gradients are reduced during the backward pass.
        shard_teacher: `--let-teacher-shard`.
    """

    stage: int
    offload_optimizer: bool = False
    offload_param: bool = False
    pin_memory: bool = False
    reduce_bucket_size: int = 500_000_000
    max_live_parameters: int = 1_000_000_000
    overlap_comm: bool = False
    shard_teacher: bool = False

    def shards(self, dp: int, first_stage: int) -> int:
        """Return the number of shards of a state that ZeRO shards from `first_stage` on."""
        return dp if self.stage >= first_stage else 1


def zero_from_config(config: Mapping[str, Any], shard_teacher: bool) -> Zero:
    """Read a config completed by `engines.deepspeed.config`; defaults are DeepSpeed's.

    Raises:
        LETError: it offloads to a device other than the CPU.
    """
    section = config["zero_optimization"]
    optimizer = section.get("offload_optimizer") or {}
    parameters = section.get("offload_param") or {}
    for offload in (optimizer, parameters):
        if offload.get("device", "none") not in ("none", "cpu"):
            raise LETError(
                f"The planner supports offload to cpu only, and the DeepSpeed config says"
                f" {offload['device']}; plan with cpu for an upper bound of host memory."
            )
    live = section.get("stage3_max_live_parameters", section.get("max_live_parameters"))
    return Zero(
        stage=section["stage"],
        offload_optimizer=optimizer.get("device", "none") != "none",
        offload_param=parameters.get("device", "none") != "none",
        pin_memory=optimizer.get("pin_memory", False),
        reduce_bucket_size=int(section.get("reduce_bucket_size", Zero.reduce_bucket_size)),
        max_live_parameters=int(live or Zero.max_live_parameters),
        overlap_comm=section.get("overlap_comm", section["stage"] == 3),
        shard_teacher=shard_teacher,
    )


def zero_memory(request: Request, layout: Layout, zero: Zero) -> StageMemory:
    """Return one rank's peak memory, which includes the activations of one microbatch."""
    student, params = request.student, stage_params(request.student, layout, 0)
    on_device = _model_states(params, layout.dp, zero)
    memory = StageMemory(
        **on_device,
        activations=activations(student, layout, request.seq_length, 0),
        buffers=_buffers(student, params, layout, zero),
        host=_host(params, layout.dp, zero),
    )
    if request.teacher is None:
        return memory
    return replace(memory, **_teacher(request, request.teacher, layout, zero))


def _model_states(params: int, dp: int, zero: Zero) -> dict[str, int]:
    """Return parameters, gradients and optimizer on the GPU, in bytes."""
    sharded = params // dp
    optimizer = (_FP32 + _MOMENTS) * params // zero.shards(dp, 1)
    return {
        "params": 0 if zero.offload_param else _BF16 * params // zero.shards(dp, 3),
        "grads": _grads(params, sharded, zero),
        "optimizer": 0 if zero.offload_optimizer else optimizer,
    }


def _grads(params: int, sharded: int, zero: Zero) -> int:
    """Return the gradients on the GPU, in bytes.

    ZeRO-0 holds bf16, and fp32 for the step; ZeRO-1 holds fp32, and a copy of the rank's shard.
    ZeRO-2 sums the microbatches on the GPU even if it offloads the optimizer.
    """
    if zero.stage == 0:
        return (_BF16 + _FP32) * params
    if zero.stage == 1:
        return _FP32 * (params + sharded)
    return 0 if zero.stage == 3 and zero.offload_optimizer else _FP32 * sharded


def _buffers(student: TransformerSize, params: int, layout: Layout, zero: Zero) -> int:
    """Return ZeRO's temporary memory: buckets in the backward pass, then a copy of gradients.

    A bucket is allocated at full size; its copy for the reduction is at most the model.
    """
    if zero.stage == 0:
        return 0
    largest = max(student.embedding_params, student.largest_matrix) // layout.tp
    num_buckets = 2 if zero.overlap_comm and zero.stage < 3 else 1
    bucket = num_buckets * zero.reduce_bucket_size * (_BF16 if zero.stage == 2 else _FP32)
    backward = bucket + _FP32 * min(params, zero.reduce_bucket_size) + _BF16 * largest
    if zero.stage < 3:
        return backward + (_BF16 * largest if zero.offload_optimizer else 0)
    gathered = _BF16 * min(params, zero.max_live_parameters)
    step = 0 if zero.offload_optimizer else _FP32 * min(params // layout.dp, _SUB_GROUP)
    return max(backward + gathered, bucket + step)


def _host(params: int, dp: int, zero: Zero) -> int:
    """Return one rank's host memory: master weights, moments, gradients and staging buffers."""
    sharded = params // dp
    found = 0
    if zero.offload_optimizer:
        # ZeRO-3 accumulates gradients here; ZeRO-1 and 2 stage the new weights.
        fp32 = _rounded(_FP32 * sharded, zero)
        found += _MOMENTS * sharded
        found += (_FP32 * sharded + 2 * fp32) if zero.stage == 3 else 2 * fp32
        found += 0 if zero.stage == 3 else _rounded(_BF16 * sharded, zero)
    return found + (_rounded(_BF16 * sharded, zero) if zero.offload_param else 0)


def _rounded(size: int, zero: Zero) -> int:
    """Round up as torch's pinned-memory allocator does, to the next power of two."""
    return 1 << (size - 1).bit_length() if zero.pin_memory else size


def _teacher(
    request: Request, teacher: TransformerSize, layout: Layout, zero: Zero
) -> dict[str, int]:
    samples = layout.micro_batch_size // samples_split(layout.tp, layout.micro_batch_size)
    weights = teacher_weights(teacher)
    # The state of each microbatch is computed just before it is needed.
    buffers = teacher_state(teacher, layout, request.seq_length)
    buffers += teacher_work(teacher, samples, request.seq_length)
    if zero.shard_teacher:
        buffers += min(weights, _BF16 * Zero.max_live_parameters)
        weights //= layout.dp
    return {"teacher_weights": weights, "teacher_buffers": buffers}


@dataclass(frozen=True)
class StepSeconds:
    """Parts of a step without a teacher, in seconds.

    Attributes:
        passes: forward and backward of all microbatches, with tensor-parallel communication.
        data_parallel: ZeRO's gathers and reductions.
        offload: copies over PCIe, and Adam on the host.
    """

    passes: float
    data_parallel: float
    offload: float

    def total(self, overlaps: bool) -> float:
        """Return the step's time; overlapped communication costs what exceeds the passes."""
        if overlaps:
            return max(self.passes, self.data_parallel) + self.offload
        return self.passes + self.data_parallel + self.offload


def step_seconds(request: Request, layout: Layout, zero: Zero) -> StepSeconds:
    """Predict one step without a teacher."""
    costs = stage_costs(request, layout)
    params = stage_params(request.student, layout, 0)
    passes = layout.num_microbatches * (costs.forward[0] + costs.backward[0])
    moved = data_parallel_bytes(params, layout.dp, layout.num_microbatches, zero)
    return StepSeconds(
        passes,
        moved / collective_bandwidth(request.gpu, layout),
        _offload_seconds(request.gpu, params // layout.dp, layout.num_microbatches, zero),
    )


def data_parallel_bytes(params: int, dp: int, num_microbatches: int, zero: Zero) -> int:
    """Return the bytes that one rank sends per step in ring collectives.

    One pass over n bytes sends n (1 - 1/dp); an all-reduce is two passes. ZeRO-0 and 1 reduce once
    per step, 2 and 3 after each microbatch. ZeRO-3 makes three passes (ZeRO paper, section 7): it
    gathers the bf16 parameters for the forward and for the backward, and scatters the gradients,
    here in fp32.
    """
    reduced, gathered = {
        0: (2 * _BF16, 0),
        1: (2 * _FP32, _BF16),
        2: (2 * _FP32 * num_microbatches, _BF16),
        3: (_FP32 * num_microbatches, 2 * _BF16 * num_microbatches),
    }[zero.stage]
    return (reduced + gathered) * params * (dp - 1) // dp


def collective_bandwidth(gpu: Gpu, layout: Layout) -> float:
    """Return one rank's bytes/s in a ring; across nodes, the rings of a node's GPUs run at once."""
    across_nodes = layout.tp * layout.dp > _GPUS_PER_NODE
    return min(gpu.link, _GPUS_PER_NODE * gpu.network) if across_nodes else gpu.link


def _offload_seconds(gpu: Gpu, sharded: int, num_microbatches: int, zero: Zero) -> float:
    """Return the time to copy gradients and weights; ZeRO-3 re-reads its gradient sum each time."""
    copied = 0.0
    if zero.offload_optimizer:
        additions = num_microbatches - 1 if zero.stage == 3 else 0
        copied += (_FP32 + _BF16 + 2 * _FP32 * additions) * sharded
    if zero.offload_param:
        copied += 2 * _BF16 * num_microbatches * sharded
    adam = _ADAM_TRAFFIC * sharded / gpu.host_memory if zero.offload_optimizer else 0.0
    return copied / gpu.pcie + adam


def estimate_zero(request: Request, layout: Layout, zero: Zero) -> Estimate:
    """Predict memory and times of a layout without pipeline parallelism."""
    costs = stage_costs(request, layout)
    parts = step_seconds(request, layout, zero)
    baseline = parts.total(zero.overlap_comm)
    seconds: dict[Placement, float] = {}
    if request.teacher is not None:
        teacher = _teacher_seconds(request, request.teacher, layout, zero, costs)
        seconds["aligned-stage"] = baseline + teacher
    return Estimate(
        request=request,
        layout=layout,
        memory=(zero_memory(request, layout, zero),),
        baseline_seconds=baseline,
        seconds=seconds,
        placement="aligned-stage" if seconds else None,
        costs=costs,
        aligned=AlignedLayer(0, 0),
        details={
            "zero": asdict(zero),
            "parts_seconds": asdict(parts),
            "assumptions": _assumptions(request, layout, zero),
        },
    )


def _teacher_seconds(
    request: Request, teacher: TransformerSize, layout: Layout, zero: Zero, costs: Costs
) -> float:
    """Return the teacher's time per step; a sharded teacher is gathered for each microbatch."""
    forward = costs.teacher
    if zero.shard_teacher:
        sent = teacher_weights(teacher) * (layout.dp - 1) // layout.dp
        forward = max(forward, sent / collective_bandwidth(request.gpu, layout))
    return layout.num_microbatches * forward


def _assumptions(request: Request, layout: Layout, zero: Zero) -> list[str]:
    """Return the assumptions behind this run's step time, one phrase each."""
    gpu = request.gpu
    bandwidth = collective_bandwidth(gpu, layout) / 1e9
    traffic = {
        0: "an all-reduce of bf16 gradients per step",
        1: "an all-reduce of fp32 gradients and a gather of bf16 parameters per step",
        2: "an all-reduce of fp32 gradients per microbatch, a gather of parameters per step",
        3: "two gathers of bf16 parameters and a scatter of fp32 gradients per microbatch",
    }[zero.stage]
    overlap = "overlapped with the passes" if zero.overlap_comm else "after the passes"
    found = [f"matrix products reach {request.efficiency:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s"]
    if layout.dp > 1:
        found.append(f"ZeRO-{zero.stage}: {traffic}, {overlap}, at {bandwidth:.0f} GB/s per rank")
    if zero.offload_optimizer or zero.offload_param:
        found.append(f"PCIe carries {gpu.pcie / 1e9:.0f} GB/s each way, without overlap")
    if zero.offload_optimizer:
        found.append(f"Adam on the host is bound by {gpu.host_memory / 1e9:.0f} GB/s per rank")
    if zero.pin_memory and zero.offload_optimizer:
        found.append("torch's allocator rounds pinned host buffers up to powers of two")
    return found
