"""Memory of one rank under DeepSpeed's ZeRO, from its config, without DeepSpeed.

It counts what DeepSpeed 0.19.8 allocates for bf16 parameters and fp32 master weights. From stage 1
on, gradients are accumulated and reduced in fp32, as the engine's configs set it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_let.errors import LETError
from megatron_let.placement.plan import samples_split
from megatron_let.planner.estimate import Estimate, Request, estimate
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
# Parameters per optimizer step of ZeRO-3, DeepSpeed's `sub_group_size`.
_SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class Zero:
    """The settings of a DeepSpeed config that memory depends on; names are DeepSpeed's.

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


def estimate_zero(request: Request, layout: Layout, zero: Zero) -> Estimate:
    """Predict memory of a layout without pipeline parallelism, and the time of its passes.

    The time of ZeRO's communication and of offload is not predicted.
    """
    # Without pipeline parallelism, only the gradients' reduction crosses nodes.
    no_reduction = replace(request, gpu=replace(request.gpu, network=math.inf))
    passes = estimate(no_reduction, layout)
    has_teacher = request.teacher is not None
    return replace(
        passes,
        request=request,
        memory=(zero_memory(request, layout, zero),),
        seconds={"aligned-stage": passes.best_seconds} if has_teacher else {},
        placement="aligned-stage" if has_teacher else None,
        details={"zero": asdict(zero), "assumptions": _assumptions(zero)},
    )


def _assumptions(zero: Zero) -> list[str]:
    """Return what the estimate assumes, one phrase each."""
    found = ["the step time is that of the passes, without ZeRO's communication and offload"]
    if zero.pin_memory and zero.offload_optimizer:
        found.append("torch's allocator rounds pinned host buffers up to powers of two")
    return found
