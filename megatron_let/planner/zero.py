"""Memory and step time of one rank under DeepSpeed's ZeRO, from its config. Needs no DeepSpeed.

Counted as DeepSpeed 0.19.8 allocates it for bf16 parameters and fp32 masters, with gradients
accumulated and reduced in fp32 from stage 1 on, as the engine's configs have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_let.errors import LETError
from megatron_let.placement.plan import samples_split
from megatron_let.placement.simulate import AlignedLayer, Costs
from megatron_let.planner.estimate import Estimate, Gpu, Request, stage_costs
from megatron_let.planner.memory import (
    Layout,
    StageMemory,
    activations,
    stage_params,
    teacher_state,
    teacher_weights,
    teacher_work,
)
from megatron_let.planner.sizes import TransformerSize

_BF16 = 2
_FP32 = 4
_MOMENTS = 2 * _FP32
_GPUS_OF_A_NODE = 8
# Parameters that ZeRO-3 steps at a time, DeepSpeed's `sub_group_size`.
_SUB_GROUP = 1_000_000_000
# DeepSpeed's CPU Adam, for one parameter: four fp32 are read, three and a bf16 are written.
_ADAM_TRAFFIC = 7 * _FP32 + _BF16


@dataclass(frozen=True)
class Zero:
    """The part of a DeepSpeed config that memory and time depend on; names are DeepSpeed's.

    Attributes:
        stage: 0 to 3.
        offload_optimizer, offload_param: to the host's memory.
        pin_memory: the optimizer's host buffers are pinned, in powers of two.
        reduce_bucket_size: elements of the gradients' bucket.
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
        """Ranks over which what is sharded from `first_stage` on is cut."""
        return dp if self.stage >= first_stage else 1


def zero_from_config(config: Mapping[str, Any], shard_teacher: bool) -> Zero:
    """Of a completed DeepSpeed config (`ds_config.complete_config`); defaults are DeepSpeed's.

    Raises:
        LETError: it offloads to another device than the CPU.
    """
    section = config["zero_optimization"]
    optimizer = section.get("offload_optimizer") or {}
    parameters = section.get("offload_param") or {}
    for offload in (optimizer, parameters):
        if offload.get("device", "none") not in ("none", "cpu"):
            raise LETError(
                f"The planner knows offload to the cpu, and the DeepSpeed config says"
                f" {offload['device']}; plan it with cpu for an upper bound of the host's memory."
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
    """Of one rank, at its fullest: with the activations of a microbatch."""
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
    """Parameters, gradients and optimizer on the GPU, in bytes."""
    sharded = params // dp
    optimizer = (_FP32 + _MOMENTS) * params // zero.shards(dp, 1)
    return {
        "params": 0 if zero.offload_param else _BF16 * params // zero.shards(dp, 3),
        "grads": _grads(params, sharded, zero),
        "optimizer": 0 if zero.offload_optimizer else optimizer,
    }


def _grads(params: int, sharded: int, zero: Zero) -> int:
    """ZeRO-0: bf16, and fp32 for the step. ZeRO-1: fp32, and the rank's part of them again.

    Under ZeRO-2 the sum over the microbatches stays on the GPU even if the optimizer does not.
    """
    if zero.stage == 0:
        return (_BF16 + _FP32) * params
    if zero.stage == 1:
        return _FP32 * (params + sharded)
    return 0 if zero.stage == 3 and zero.offload_optimizer else _FP32 * sharded


def _buffers(student: TransformerSize, params: int, layout: Layout, zero: Zero) -> int:
    """What ZeRO needs beside the states: buckets in the backward pass, a copy of gradients after.

    A bucket is allocated whole; its copy for the reduction holds no more than the model.
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
    """Host memory of one rank: masters, moments, gradients and what is copied between."""
    sharded = params // dp
    found = 0
    if zero.offload_optimizer:
        # ZeRO-3 keeps the sum over the microbatches here; ZeRO-1 and 2 stage the new weights.
        fp32 = _rounded(_FP32 * sharded, zero)
        found += _MOMENTS * sharded
        found += (_FP32 * sharded + 2 * fp32) if zero.stage == 3 else 2 * fp32
        found += 0 if zero.stage == 3 else _rounded(_BF16 * sharded, zero)
    return found + (_rounded(_BF16 * sharded, zero) if zero.offload_param else 0)


def _rounded(size: int, zero: Zero) -> int:
    """Bytes that torch's allocator of pinned memory takes: the next power of two."""
    return 1 << (size - 1).bit_length() if zero.pin_memory else size


def _teacher(
    request: Request, teacher: TransformerSize, layout: Layout, zero: Zero
) -> dict[str, int]:
    samples = layout.micro_batch_size // samples_split(layout.tp, 1, layout.micro_batch_size)
    weights = teacher_weights(teacher)
    # States of the coming microbatches are computed one at a time, as they are due.
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
        passes: forward and backward of all microbatches, tensor-parallel exchanges included.
        data_parallel: ZeRO's gathers and reductions.
        offload: copies over PCIe, and Adam on the host.
    """

    passes: float
    data_parallel: float
    offload: float

    def total(self, overlaps: bool) -> float:
        """Of the step; what overlaps costs as much as it is longer than the passes."""
        if overlaps:
            return max(self.passes, self.data_parallel) + self.offload
        return self.passes + self.data_parallel + self.offload


def step_seconds(request: Request, layout: Layout, zero: Zero) -> StepSeconds:
    """Of one step without a teacher; see `assumptions`."""
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
    """Bytes that one rank sends in a step by rings: n (1 - 1/dp) for a pass over n bytes.

    ZeRO-0 and 1 reduce once a step, 2 and 3 after each microbatch; an all-reduce is two passes.
    ZeRO-3 makes three passes (ZeRO paper, section 7): it gathers the bf16 parameters for the
    forward and again for the backward, and scatters the gradients, here in fp32.
    """
    reduced, gathered = {
        0: (2 * _BF16, 0),
        1: (2 * _FP32, _BF16),
        2: (2 * _FP32 * num_microbatches, _BF16),
        3: (_FP32 * num_microbatches, 2 * _BF16 * num_microbatches),
    }[zero.stage]
    return (reduced + gathered) * params * (dp - 1) // dp


def collective_bandwidth(gpu: Gpu, layout: Layout) -> float:
    """Bytes a second of one rank in a ring: over nodes, their GPUs' rings run side by side."""
    over_nodes = layout.tp * layout.dp > _GPUS_OF_A_NODE
    return min(gpu.link, _GPUS_OF_A_NODE * gpu.network) if over_nodes else gpu.link


def _offload_seconds(gpu: Gpu, sharded: int, num_microbatches: int, zero: Zero) -> float:
    """Gradients down and weights up once a step; ZeRO-3 fetches each sum of gradients to add to."""
    copied = 0.0
    if zero.offload_optimizer:
        additions = num_microbatches - 1 if zero.stage == 3 else 0
        copied += (_FP32 + _BF16 + 2 * _FP32 * additions) * sharded
    if zero.offload_param:
        copied += 2 * _BF16 * num_microbatches * sharded
    adam = _ADAM_TRAFFIC * sharded / gpu.host_memory if zero.offload_optimizer else 0.0
    return copied / gpu.pcie + adam


def estimate_zero(request: Request, layout: Layout, zero: Zero) -> Estimate:
    """Memory and times of a layout without pipeline."""
    memory = zero_memory(request, layout, zero)
    parts, costs = step_seconds(request, layout, zero), stage_costs(request, layout)
    overlaps = zero.overlap_comm
    seconds: dict[Any, float] = {}
    if request.teacher is not None:
        teacher = _teacher_seconds(request, request.teacher, layout, zero, costs)
        seconds["aligned-stage"] = parts.total(overlaps) + teacher
    return Estimate(
        layout=layout,
        memory=(memory,),
        baseline_seconds=parts.total(overlaps),
        seconds=seconds,
        placement="aligned-stage" if seconds else None,
        costs=costs,
        owner=AlignedLayer(0, 0),
        fits=memory.total <= request.gpu.memory * (1 - request.reserve),
    )


def _teacher_seconds(
    request: Request, teacher: TransformerSize, layout: Layout, zero: Zero, costs: Costs
) -> float:
    """Of one step; a sharded teacher is gathered for each microbatch, as it runs."""
    forward = costs.teacher
    if zero.shard_teacher:
        sent = teacher_weights(teacher) * (layout.dp - 1) // layout.dp
        forward = max(forward, sent / collective_bandwidth(request.gpu, layout))
    return layout.num_microbatches * forward


def assumptions(request: Request, layout: Layout, zero: Zero) -> list[str]:
    """What the step time rests on, a sentence each, for this run."""
    gpu = request.gpu
    bandwidth = collective_bandwidth(gpu, layout) / 1e9
    traffic = {
        0: "an all-reduce of bf16 gradients once a step",
        1: "an all-reduce of fp32 gradients and a gather of bf16 parameters once a step",
        2: "an all-reduce of fp32 gradients after each microbatch, a gather of parameters once",
        3: "two gathers of bf16 parameters and a scatter of fp32 gradients for each microbatch",
    }[zero.stage]
    overlap = "beside the passes" if zero.overlap_comm else "after the passes"
    found = [f"matrix products reach {request.efficiency:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s"]
    if layout.dp > 1:
        found.append(f"ZeRO-{zero.stage}: {traffic}, {overlap}, at {bandwidth:.0f} GB/s a rank")
    if zero.offload_optimizer or zero.offload_param:
        found.append(f"PCIe carries {gpu.pcie / 1e9:.0f} GB/s each way; nothing overlaps with it")
    if zero.offload_optimizer:
        found.append(f"Adam on the host is bound by {gpu.host_memory / 1e9:.0f} GB/s a rank")
    if zero.pin_memory and zero.offload_optimizer:
        found.append("pinned host buffers take powers of two, as torch's allocator rounds them")
    return found
