"""LET on one rank: the teacher, the hook on layer k and the schedule of the teacher's work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError, raised_on_all_ranks
from megatron_let.losses import load_loss
from megatron_let.losses.alignment_hook import AlignmentHook
from megatron_let.methods.base import TrainingRun, find_layer, teacher_group
from megatron_let.methods.global_batch import GlobalBatch, TokenSharing
from megatron_let.methods.learned_projection import LearnedProjection, with_projection
from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.plan import Plan, num_microbatches_together
from megatron_let.placement.program import AlignedLayer
from megatron_let.placement.sample_sharing import SampleSharing, local_shard, stage_ranks
from megatron_let.placement.scheduler import PlacementScheduler
from megatron_let.placement.sequence_shard import SequenceShard
from megatron_let.placement.state_buffer import TeacherStateBuffer
from megatron_let.placement.transfer import Transfer, without_device_wait
from megatron_let.teacher.model import DTYPES, Teacher, load_teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LETContext:
    """State of LET on one rank while the weight is above 0.

    Attributes:
        hook: hook on layer k; None on other stages.
        states: computes and buffers the teacher states.
        tokens: shares the tokens of a global batch.
        scheduler: plans the teacher's work.
        counts_tokens: whether the values that this rank reports do not repeat another rank's.
        restore_config: undoes `without_device_wait`; None if no states are sent.
    """

    hook: AlignmentHook | None
    states: TeacherStateBuffer
    tokens: TokenSharing
    scheduler: PlacementScheduler
    stage: int
    counts_tokens: bool
    restore_config: Callable[[], None] | None

    def begin(self, batch: GlobalBatch) -> Plan:
        """Begin a global batch; return the plan of the states that are still to be computed."""
        num_microbatches = len(batch.tokens)
        num_ready = self.states.num_computed_ahead if batch.begins_with_shared else 0
        plan = self.scheduler.plan(num_microbatches, num_ready, batch.next_tokens is not None)
        self.states.begin(batch.tokens, plan, batch.next_tokens)
        return plan

    def close(self) -> None:
        """Remove the hook and release the buffers and the process group."""
        if self.hook is not None:
            self.hook.remove()
        if self.restore_config is not None:
            self.restore_config()
        self.states.close()


def build_context(
    run: TrainingRun,
    model: list[torch.nn.Module],
    shape: tuple[int, int, int],
    projection: LearnedProjection | None,
) -> LETContext:
    """Load the teacher and attach the hook; collective over all ranks of the job.

    Args:
        shape: (num_microbatches, b, s) of the first global batch.
        projection: if it is learned and this stage has layer k.

    Raises:
        LETError: the teacher cannot be loaded, or does not fit the projection.
    """
    num_microbatches, micro_batch_size, seq_length = shape
    config, device = run.config, next(model[0].parameters()).device
    model_config = get_model_config(model[0])
    stage = parallel_state.get_pipeline_model_parallel_rank()
    found = find_layer(model, config.layer)
    aligned = _aligned_layer(None if found is None else AlignedLayer(stage, found[0]), device)
    group = stage_ranks()
    scheduler = PlacementScheduler(
        config.placement,
        config.max_prefetch,
        _pipeline(model_config, len(model)),
        aligned,
        num_microbatches_together(1 if group is None else group.size(), micro_batch_size),
        run.report,
    )
    shard = local_shard(model_config.sequence_parallel)
    has_teacher = scheduler.needs_teacher_everywhere or found is not None
    on_all_stages = scheduler.needs_teacher_everywhere
    samples = _samples(run, shard, device, has_teacher, on_all_stages)
    width = run.folder.hidden_size if samples is None else samples.width
    if projection is not None and width != len(projection.weight):
        raise LETError(
            f"The teacher {run.folder.path} gives states of width {width} but its config.json says"
            f" {run.folder.hidden_size}, the width of --let-projection learned; use interpolate."
        )
    transfer = Transfer(aligned.stage, device) if scheduler.needs_teacher_everywhere else None
    teacher_stage = None if scheduler.needs_teacher_everywhere else aligned.stage
    local = (shard.num_local(seq_length), micro_batch_size, width)
    like = torch.empty(local, dtype=DTYPES[config.teacher_dtype], device="meta")
    if transfer is not None and samples is not None:
        limit = scheduler.max_states(num_microbatches)
        run.report(
            f"LET: placement {config.placement}; the stage of layer {config.layer} holds at most"
            f" {limit} states before their backward, {limit * like.nbytes / 2**20:.1f} MiB per rank"
        )
    return LETContext(
        hook=None if found is None else _hook(found[1], config, shard, projection),
        states=TeacherStateBuffer(samples, transfer, stage, aligned.stage, like, device),
        tokens=TokenSharing(run.folder, run.teacher_length, device, teacher_stage),
        scheduler=scheduler,
        stage=stage,
        # Without sequence parallelism every tensor-parallel rank holds the same tokens.
        counts_tokens=shard.sp_size > 1 or parallel_state.get_tensor_model_parallel_rank() == 0,
        restore_config=None if transfer is None else without_device_wait(model_config),
    )


def _samples(
    run: TrainingRun,
    shard: SequenceShard,
    device: torch.device,
    has_teacher: bool,
    on_all_stages: bool,
) -> SampleSharing | None:
    """Load the teacher if this stage runs it; collective over all ranks of the job."""
    loaded: Teacher | None = None
    with raised_on_all_ranks(device):
        if has_teacher:
            loaded = load_teacher(
                run.folder,
                run.config,
                device,
                run.sharding,
                run.teacher_length,
                run.documents,
                teacher_group(on_all_stages),
            )
    if loaded is None:
        return None
    stage = parallel_state.get_pipeline_model_parallel_rank()
    size = loaded.num_bytes / 2**20
    logger.info("LET: teacher %s (%.0f MiB) on stage %d", run.folder.path, size, stage)
    return SampleSharing(loaded, shard, stage_ranks())


def _hook(
    layer: torch.nn.Module,
    config: LETConfig,
    shard: SequenceShard,
    projection: LearnedProjection | None,
) -> AlignmentHook:
    loss = load_loss(config.loss, _token_group(shard))
    return AlignmentHook(layer, loss if projection is None else with_projection(loss, projection))


def _aligned_layer(mine: AlignedLayer | None, device: torch.device) -> AlignedLayer:
    """Return the stage and model chunk of layer k, on every rank."""
    place = torch.tensor(mine or (-1, -1), device=device)
    group = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.all_reduce(place, op=torch.distributed.ReduceOp.MAX, group=group)
    return AlignedLayer(*place.tolist())


def _pipeline(config: Any, num_chunks: int) -> Pipeline:
    return Pipeline(
        num_stages=parallel_state.get_pipeline_model_parallel_world_size(),
        num_microbatches=0,
        num_chunks=num_chunks,
        group_size=config.microbatch_group_size_per_vp_stage or 0,
        overlap_p2p=config.overlap_p2p_comm,
    )


def _token_group(shard: SequenceShard) -> torch.distributed.ProcessGroup:
    """Return the ranks that hold different tokens of the same microbatch."""
    if shard.sp_size > 1:
        return parallel_state.get_tensor_and_context_parallel_group()
    return parallel_state.get_context_parallel_group()
