"""The teacher, the hook on layer k and the plan, put together for one rank."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config, unwrap_model

from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError
from megatron_let.losses import AlignmentLoss, load_loss
from megatron_let.methods.alignment_hook import AlignmentHook
from megatron_let.methods.global_batch import TokenSharing
from megatron_let.methods.learned_projection import LearnedProjection, behind_projection
from megatron_let.placement.pipeline import Pipeline
from megatron_let.placement.sample_sharing import SharedSamples, samples_group
from megatron_let.placement.scheduler import Placer
from megatron_let.placement.sequence_shard import SequenceShard
from megatron_let.placement.simulate import Owner
from megatron_let.placement.state_buffer import PlacedStates
from megatron_let.placement.transfer import Transfer
from megatron_let.teacher.inspect import TeacherFolder
from megatron_let.teacher.model import DTYPES, Sharding, load_teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attachment:
    """What LET keeps on one rank while the weight is above 0.

    Attributes:
        hook: on layer k; None on a stage without it.
        counts_tokens: this rank's cosines are no repetition of another rank's.
    """

    hook: AlignmentHook | None
    states: PlacedStates
    tokens: TokenSharing
    placer: Placer
    stage: int
    counts_tokens: bool

    def close(self) -> None:
        """Take everything away again."""
        if self.hook is not None:
            self.hook.remove()
        self.states.close()


def owned_layer(
    model: list[torch.nn.Module], layer_number: int
) -> tuple[int, torch.nn.Module] | None:
    """Model chunk and transformer layer with this global 1-based number; None on other stages."""
    for index, chunk in enumerate(unwrap_model(model)):
        for layer in chunk.decoder.layers:
            if layer.layer_number == layer_number:
                return index, layer
    return None


def attach(
    config: LETConfig,
    folder: TeacherFolder,
    model: list[torch.nn.Module],
    shape: tuple[int, int, int],
    report: Callable[[str], None],
    sharding: Sharding | None = None,
    projection: LearnedProjection | None = None,
) -> Attachment:
    """Load the teacher where it will run, and set the hook where layer k is.

    Args:
        config, folder: of the teacher.
        model: this rank's model chunks.
        shape: (num_microbatches, b, s) of the first global batch.
        report: prints one line on one rank.
        projection: where it is learned and this stage owns layer k.
    """
    num_microbatches, micro_batch_size, seq_length = shape
    device = next(model[0].parameters()).device
    model_config = get_model_config(model[0])
    stage = parallel_state.get_pipeline_model_parallel_rank()
    found = owned_layer(model, config.layer)
    owner = _owner(None if found is None else Owner(stage, found[0]), device)
    placer = Placer(
        config.placement, config.max_prefetch, _pipeline(model_config, len(model)), owner, report
    )
    shard = _this_rank(model_config)
    samples, group = None, samples_group(micro_batch_size)
    if placer.needs_teacher_everywhere or found is not None:
        teacher = load_teacher(folder, config, device, sharding)
        samples = SharedSamples(teacher, shard, group)
        logger.info(
            "LET: teacher %s (%.0f MiB) on stage %d", folder.path, teacher.num_bytes / 2**20, stage
        )
    elif group is not None:
        torch.distributed.destroy_process_group(group)
    width = folder.hidden_size if samples is None else samples.width
    if projection is not None and width != len(projection.weight):
        raise LETError(
            f"The teacher {folder.path} gives states of width {width} where its config.json says"
            f" {folder.hidden_size}, the width of --let-projection learned; use interpolate."
        )
    transfer = Transfer(owner.stage, device) if placer.needs_teacher_everywhere else None
    local = (shard.num_local(seq_length), micro_batch_size, width)
    like = torch.empty(local, dtype=DTYPES[config.teacher_dtype], device="meta")
    if transfer is not None:
        limit = placer.max_prefetch(num_microbatches)
        report(
            f"LET: placement {config.placement}; the stage of layer {config.layer} holds at most"
            f" {limit} states before their backward, {limit * like.nbytes / 2**20:.1f} MiB a rank"
        )
    return Attachment(
        hook=None if found is None else AlignmentHook(found[1], _loss(config, shard, projection)),
        states=PlacedStates(samples, transfer, stage, owner.stage, like, device),
        tokens=TokenSharing(folder, device),
        placer=placer,
        stage=stage,
        # Without sequence parallelism every tensor-parallel rank holds the same tokens.
        counts_tokens=shard.sp_size > 1 or parallel_state.get_tensor_model_parallel_rank() == 0,
    )


def _loss(
    config: LETConfig, shard: SequenceShard, projection: LearnedProjection | None
) -> AlignmentLoss:
    loss = load_loss(config.loss, _token_group(shard))
    return loss if projection is None else behind_projection(loss, projection)


def _owner(mine: Owner | None, device: torch.device) -> Owner:
    """Stage and model chunk of layer k, on every rank."""
    place = torch.tensor(mine or (-1, -1), device=device)
    group = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.all_reduce(place, op=torch.distributed.ReduceOp.MAX, group=group)
    return Owner(*place.tolist())


def _pipeline(config: Any, num_chunks: int) -> Pipeline:
    return Pipeline(
        num_stages=parallel_state.get_pipeline_model_parallel_world_size(),
        num_microbatches=0,
        num_chunks=num_chunks,
        group_size=config.microbatch_group_size_per_vp_stage or 0,
        overlap_p2p=config.overlap_p2p_comm,
    )


def _this_rank(config: Any) -> SequenceShard:
    return SequenceShard(
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        sp_size=config.tensor_model_parallel_size if config.sequence_parallel else 1,
        sp_rank=parallel_state.get_tensor_model_parallel_rank() if config.sequence_parallel else 0,
    )


def _token_group(shard: SequenceShard) -> torch.distributed.ProcessGroup:
    """The ranks that hold other tokens of the same microbatch."""
    if shard.sp_size > 1:
        return parallel_state.get_tensor_and_context_parallel_group()
    return parallel_state.get_context_parallel_group()
