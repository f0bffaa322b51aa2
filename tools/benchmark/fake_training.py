"""One rank's training step under fake tensors, which run Megatron's code without its memory.

Model, DDP's buffers, the distributed optimizer, the pipeline schedule and, with LET, the teacher,
its states and the hook are real; process groups are torch's fake ones, so one process can be any
rank of any layout. Device and kernels are the CPU's, except for what `_shims` replaces. Tokens are
routed evenly over the experts, which run one after another (`SequentialMLP`).
"""

import argparse
import contextlib
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import CPU, llama_config
from peak_memory import PeakMemory
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_let.cli.plan import megatron_arguments
from megatron_let.compat.device import Host, prepare_process, set_hardware_queues
from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.plan import plan
from megatron_let.planner.estimate import Estimate, Request
from megatron_let.planner.sizes import TransformerSize

# The run has a GPU's flags: Megatron's fused activations determine what a layer keeps.
GPU = Host(cuda=True, transformer_engine=False, fused_gradients=False)


@dataclass(frozen=True)
class FakeRun:
    """One rank of a planned run.

    Attributes:
        stage: pipeline stage; the rank is the first of this stage.
        request, planned: the planner's, whose layout and placement the run has.
    """

    config: Path
    flags: tuple[str, ...]
    stage: int
    request: Request
    planned: Estimate

    @property
    def pipeline(self) -> Pipeline:
        """Return the pipeline with only as many microbatches as fill it."""
        whole = self.planned.layout.pipeline
        return replace(whole, num_microbatches=min(whole.num_microbatches, 2 * whole.num_stages))


def measure(run: FakeRun) -> dict[str, int]:
    """Build the rank, run the forward and backward passes of a step, and count bytes.

    Changes torch for the rest of the process, so call it in a separate process.

    Returns:
        Bytes at the peak: params, grads, optimizer, teacher_weights and their total;
        activations is everything else, including the teacher's states and activations.
    """
    # Before any import of Megatron.
    prepare_process(CPU, 0)
    from megatron_let.compat.apply import apply_host_patches

    apply_host_patches(CPU)
    args = _arguments(run)
    _join_groups(args)
    with _shims(), FakeTensorMode(allow_non_fake_inputs=True), PeakMemory() as memory:
        model, optimizer = _model_and_optimizer(args)
        size = run.request.teacher
        teacher = None if size is None else _teacher(size, args)
        # Set-up peaks above training: DDP copies the parameters into its buffer.
        gc.collect()
        memory.reset_peak()
        _step(args, run, model, teacher)
        params = [p for chunk in model for p in chunk.parameters()]
        held = {
            "params": _bytes(params),
            "grads": _bytes(p.main_grad for p in params),
            "optimizer": _bytes(_optimizer_tensors(optimizer)),
            "teacher_weights": 0 if teacher is None else teacher.num_bytes,
        }
    return held | {"activations": memory.peak - sum(held.values()), "total": memory.peak}


def _arguments(run: FakeRun) -> argparse.Namespace:
    """Return Megatron's validated arguments of a run on GPUs without Transformer Engine."""
    from megatron.training.arguments import parse_args, validate_args

    layout = run.planned.layout
    ranks_per_stage = layout.tp * layout.cp * layout.dp
    os.environ.update(RANK=str(run.stage * ranks_per_stage), LOCAL_RANK="0")
    os.environ["WORLD_SIZE"] = str(layout.pp * ranks_per_stage)
    # Fake tensors have no values to initialise or to check.
    flags = [*GPU.argv(), "--use-cpu-initialization", "--no-initialization"]
    flags += ["--no-check-for-nan-in-loss-and-grad", *run.flags]
    if layout.num_chunks > 1:
        flags += ["--num-virtual-stages-per-pipeline-rank", str(layout.num_chunks)]
    parsed = megatron_arguments(run.config, flags)
    set_hardware_queues(parsed)
    args = parse_args(lambda parser: SimpleNamespace(parse_args=lambda: parsed))
    validate_args(args)
    args.padded_vocab_size = run.request.student.vocab_size
    return args


def _join_groups(args: argparse.Namespace) -> None:
    """Create fake process groups, of which this process is one rank."""
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=args.rank, world_size=args.world_size
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)


@contextlib.contextmanager
def _shims() -> Iterator[None]:
    """Replace what fake tensors and groups do not support, and where a CPU differs from a GPU."""
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from megatron_let.compat.local_layers import RMSNorm

    collectives = torch.library.Library("c10d", "IMPL")
    for name in ("allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_"):
        collectives.impl(name, lambda *args: FakeWork().boxed(), "Meta")
    with (
        mock.patch.object(torch.distributed, "all_gather_object", _all_gather_object),
        # It compares generator states; no dropout uses them here.
        mock.patch.object(CudaRNGStatesTracker, "fork", lambda *args: contextlib.nullcontext()),
        mock.patch.object(RMSNorm, "forward", _like_a_gpu),
        mock.patch.object(fused_bias_swiglu, "swiglu", _swiglu),
        mock.patch.object(fused_bias_swiglu, "swiglu_back", _swiglu_back),
        mock.patch.object(fused_bias_swiglu, "weighted_swiglu", _weighted_swiglu),
        mock.patch.object(fused_bias_swiglu, "weighted_swiglu_back", _weighted_swiglu_back),
        mock.patch.object(MoEAlltoAllTokenDispatcher, "preprocess", _route_evenly),
        mock.patch.object(
            MoEAlltoAllTokenDispatcher,
            "_maybe_dtoh_and_synchronize",
            lambda dispatcher, point, counts=None: counts,
        ),
    ):
        yield


def _all_gather_object(gathered: list[Any], value: Any, group: Any = None) -> None:
    gathered[:] = [value] * len(gathered)


class _FusedRMSNorm(torch.autograd.Function):
    """Allocates and saves what CUDA's `_fused_rms_norm` does, without computing."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        rstd = hidden.new_empty((*hidden.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, rstd)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden, weight, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight)


def _like_a_gpu(norm: Any, hidden: Tensor) -> Tensor:
    # On a CPU torch's norm saves three fp32 copies of its input.
    return _FusedRMSNorm.apply(hidden, norm.weight)


# On a GPU Megatron fuses these with torch.compile, so they allocate only their result.


def _swiglu(inputs: Tensor) -> Tensor:
    return inputs.new_empty((*inputs.shape[:-1], inputs.shape[-1] // 2))


def _swiglu_back(gradient: Tensor, inputs: Tensor) -> Tensor:
    return torch.empty_like(inputs)


def _weighted_swiglu(inputs: Tensor, weights: Tensor) -> Tensor:
    return _swiglu(inputs)


def _weighted_swiglu_back(
    gradient: Tensor, inputs: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inputs), torch.empty_like(weights)


def _route_evenly(dispatcher: Any, routing_map: Tensor) -> Any:
    """Set the counts of `preprocess`, which needs values, for equally many tokens per expert."""
    tp, ep, local = dispatcher.tp_size, dispatcher.ep_size, dispatcher.num_local_experts
    dispatcher.num_out_tokens = routing_map.shape[0] * dispatcher.config.moe_router_topk
    per_expert, left = divmod(dispatcher.num_out_tokens, dispatcher.num_experts)
    assert left == 0, "the tokens of a microbatch do not divide over the experts"
    if ep > 1 or tp > 1:
        dispatcher.input_splits = dispatcher.output_splits = [local * per_expert] * ep
        dispatcher.output_splits_tp = np.full(tp, ep * local * per_expert)
    dispatcher.num_global_tokens_per_local_expert = np.full((tp * ep, local), per_expert)
    chunks = np.arange(dispatcher.num_experts * tp)
    dispatcher.sort_input_by_local_experts = chunks.reshape(-1, local).T.ravel()
    dispatcher.restore_output_by_local_experts = chunks.reshape(local, -1).T.ravel()
    return np.full(local, tp * ep * per_expert)


def _model_and_optimizer(args: argparse.Namespace) -> tuple[list[Any], Any]:
    """Build this rank's model chunks under DDP, and the optimizer with its state allocated."""
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )

    from megatron_let.compat.local_layers import local_layer_spec

    model_config = gpt_config_from_args(args)
    model_config.transformer_layer_spec = local_layer_spec
    config = pretrain_cfg_container_from_args(args, model_config)
    model = model_config.get_builder_cls()(model_config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=config.ddp,
        data_parallel_random_init=False,
        mixed_precision_wrapper=_in_half_precision,
    )
    optimizer = get_megatron_optimizer(config.optimizer, model, use_gloo_process_groups=False)
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            # torch's only Adam that does not read the value of its step counter.
            group.update(fused=True, foreach=False)
        part._init_optimizer_states_with_dummy_values()
    return model, optimizer


def _in_half_precision(config: Any, module: Any) -> Any:
    """Build `Float16Module` without its cast, which fails on fake parameters."""
    from megatron.core.transformer.module import Float16Module

    assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())
    module.bfloat16 = lambda: module
    return Float16Module(config, module)


def _parts(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    """Return the fp32 parameters and both moments."""
    for part in _parts(optimizer):
        for parameter, state in part.optimizer.state.items():
            yield parameter
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _teacher(size: TransformerSize, args: argparse.Namespace) -> Any:
    """Build a bf16 Llama of these sizes, as `load_teacher` returns it."""
    from transformers import AutoModel

    from megatron_let.teacher.model import Teacher

    model = AutoModel.from_config(
        llama_config(size), dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    # The check compares values, which fake tensors lack.
    with mock.patch.object(Teacher, "_check_causal", lambda teacher: size.hidden_size):
        return Teacher(model, size.num_layers, size.num_layers, args.let_teacher_final_norm)


def _step(args: argparse.Namespace, run: FakeRun, model: list[Any], teacher: Any) -> None:
    """Run the forward and backward passes of a global batch, and reduce its gradients."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    from megatron_let.methods.forward_step import make_forward_step

    config = get_model_config(model[0])
    config.finalize_model_grads_func = finalize_model_grads
    one = len(model) == 1
    config.no_sync_func = model[0].no_sync if one else [chunk.no_sync for chunk in model]
    data = [_microbatches(args) for _ in model]
    for chunk in model:
        chunk.zero_grad_buffer()
    # Fake tensors have no values to check.
    check = mock.patch("megatron_let.data.gpt.check_batch")
    with check, _aligned(args, run, model, teacher, make_forward_step(args)) as forward_step:
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data[0] if one else data,
            model=model,
            num_microbatches=run.pipeline.num_microbatches,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )


def _microbatches(args: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    shape = (args.micro_batch_size, args.seq_length)
    while True:
        yield {
            "tokens": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.zeros(shape, dtype=torch.int64),
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(shape[1]).expand(shape),
        }


@contextlib.contextmanager
def _aligned(
    args: argparse.Namespace,
    run: FakeRun,
    model: list[Any],
    teacher: Any,
    forward_step: Callable[..., Any],
) -> Iterator[Callable[..., Any]]:
    """Yield the forward step of a step with LET, as `LETMethod` builds it."""
    from megatron_let.config.arguments import layer_number
    from megatron_let.losses import load_loss
    from megatron_let.losses.alignment_hook import AlignmentHook
    from megatron_let.methods.base import find_layer

    if teacher is None:
        yield forward_step
        return
    states = _state_buffer(args, run, teacher)
    found = find_layer(model, layer_number(args))
    if found is not None:
        hook = AlignmentHook(found[1], load_loss("cosine", None))
        hook.open_step(states, 1.0, torch.device("cpu"))
    states.before_schedule()

    def counted(*arguments: Any) -> Any:
        result = forward_step(*arguments)
        states.after_forward()
        return result

    yield counted
    states.after_backward()
    states.end()


def _state_buffer(args: argparse.Namespace, run: FakeRun, teacher: Any) -> Any:
    """Build this rank's teacher state buffer and begin the global batch."""
    from megatron_let.placement.sample_sharing import SampleSharing, local_shard, stage_ranks
    from megatron_let.placement.state_buffer import TeacherStateBuffer
    from megatron_let.placement.transfer import Transfer

    planned, pipeline = run.planned, run.pipeline
    assert planned.placement is not None, "a teacher needs a placement"
    prefetch = min(run.request.prefetch(planned.layout), pipeline.num_microbatches)
    work = plan(
        planned.placement, pipeline, planned.costs, planned.aligned,
        max_prefetch=prefetch, look_ahead=False,
    )  # fmt: skip
    device, b, s = torch.device("cpu"), args.micro_batch_size, args.seq_length
    shard = local_shard(args.sequence_parallel)
    samples = SampleSharing(teacher, shard, stage_ranks())
    like = torch.empty((shard.num_local(s), b, teacher.width), dtype=torch.bfloat16, device="meta")
    aligned = planned.aligned.stage
    transfer = Transfer(aligned, device) if len(work.stages) > 1 else None
    states = TeacherStateBuffer(samples, transfer, run.stage, aligned, like, device)
    states.begin(torch.zeros(pipeline.num_microbatches, b, s, dtype=torch.int64), work, None)
    return states
