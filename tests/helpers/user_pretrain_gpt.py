"""A user's training script like Megatron-LM's pretrain_gpt.py (pretrain_hybrid.py, if a pattern is
given), with its own model builder, data provider and forward step. With LET=1 it has the three
lines of megatron_let.integration; without, it is stock Megatron and imports nothing of LET.
"""

from __future__ import annotations

import os
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.global_vars import get_tensorboard_writer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

LET = os.environ.get("LET") == "1"
if LET:
    from megatron_let import integration as let

KEYS = ["attention_mask", "labels", "loss_mask", "position_ids", "tokens"]


def get_batch(data_iterator):  # type: ignore[no-untyped-def]
    args = get_args()
    if not is_first_or_last_pipeline_stage(None):
        return [None] * len(KEYS)
    batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        batch = next(data_iterator)
        for key in KEYS:
            batch[key] = batch[key].cuda() if batch.get(key) is not None else None
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return [batch[key] for key in KEYS]


def loss_func(loss_mask, output):  # type: ignore[no-untyped-def]
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    tokens = mask.sum().clone().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), tokens.view(1)])}


def forward_step(data_iterator, model):  # type: ignore[no-untyped-def]
    attention_mask, labels, loss_mask, position_ids, tokens = get_batch(data_iterator)
    output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)


def datasets(num_samples, vp_stage=None):  # type: ignore[no-untyped-def]
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    built = lambda: (  # noqa: E731
        mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, num_samples, built, config).build()


if __name__ == "__main__":
    datasets.is_distributed = True
    args = parse_and_validate_args(extra_args_provider=let.add_arguments if LET else None)
    if LET:
        let.enable(args)
    is_hybrid = args.hybrid_layer_pattern is not None
    model = hybrid_config_from_args(args) if is_hybrid else gpt_config_from_args(args)
    if os.environ.get("LOCAL_SPEC") == "1":
        # The layers of a host without Transformer Engine, so that two runs differ in LET alone.
        from megatron_let.compat.local_hybrid import local_hybrid_spec
        from megatron_let.compat.local_layers import use_local_layers

        if is_hybrid:
            model.hybrid_stack_spec = local_hybrid_spec(model.transformer)
        else:
            use_local_layers(model)
    container = pretrain_cfg_container_from_args(args, model)
    pretrain(container, datasets, ModelType.encoder_or_decoder, forward_step)
    writer = get_tensorboard_writer()
    if writer is not None:
        # Megatron's last evaluation is logged after its own flush.
        writer.flush()
