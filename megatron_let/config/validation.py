"""Megatron flags that LET does not support, refused before training starts."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_let.config.arguments import flag
from megatron_let.config.let_config import METHODS
from megatron_let.errors import LETError

# Megatron argument -> the only supported value, and the reason.
Table = dict[str, tuple[Any, str]]

# For every method.
REFUSED: Table = {
    "cuda_graph_impl": ("none", "CUDA graphs bypass the hook on layer k"),
    "overlap_moe_expert_parallel_comm": (False, "its schedule bypasses the hook on layer k"),
    "moe_expert_rank_capacity_factor": (None, "it runs a step twice, outside LET"),
    "hybrid_layer_pattern": (None, "hybrid models have no k-th transformer layer"),
    "sft": (False, "the teacher reads whole sequences, not packed ones"),
    "reset_attention_mask": (False, "the teacher attends across documents"),
    "reset_position_ids": (False, "the teacher counts positions from the sequence's start"),
    "dataloader_inter_document_masking": (False, "the teacher attends across documents"),
    "hybrid_context_parallel": (False, "its sequences have no fixed length"),
    "perform_rl_step": (False, "LET is for pretraining"),
    "gtp_weight_remat_size": (1, "it is untested"),
}
REFUSED_WITH_LOGITS: Table = {
    "mtp_num_layers": (None, "the teacher predicts one token ahead"),
    "use_megatron_fsdp": (False, "it is untested; shard by --use-distributed-optimizer"),
    "use_torch_fsdp2": (False, "it is untested; shard by --use-distributed-optimizer"),
}
REFUSED_WITH_PROJECTION: Table = {
    "optimizer": ("adam", "its linear layer is trained by Adam"),
    "optimizer_cuda_graph": (False, "its update is in the optimizer's step"),
    "ckpt_format": ("torch_dist", "other formats store only the model's weights"),
    "ckpt_assume_constant_structure": (False, "it leaves the checkpoints at --let-stop-step"),
    "non_persistent_save_interval": (None, "non-persistent checkpoints do not store it"),
}
_UNTESTED = "it is tested with data parallelism only"
_NO_CHECKPOINTS = (
    "no checkpoint of FSDP could be resumed in a test; use --use-distributed-optimizer"
)
REFUSED_WITH_FSDP: Table = {
    "tensor_model_parallel_size": (1, _UNTESTED),
    "pipeline_model_parallel_size": (1, _UNTESTED),
    "context_parallel_size": (1, _UNTESTED),
    "let_projection": ("interpolate", "it is untested"),
    "save": (None, _NO_CHECKPOINTS),
    "load": (None, _NO_CHECKPOINTS),
}
# Flags that are not named like their argument.
_FLAGS = {"gtp_weight_remat_size": "--tensor-parallel-num-weight-shards"}


def check_supported(args: argparse.Namespace) -> None:
    """Check that no Megatron flag bypasses the teacher or changes its input.

    Raises:
        LETError: names the flag and what to do.
    """
    learns_from = METHODS[args.let_method or "none"].learns_from
    if learns_from is None:
        return
    method = f"--let-method {args.let_method}"
    _refuse(args, REFUSED, method)
    if learns_from == "logits":
        _refuse(args, REFUSED_WITH_LOGITS, method)
    elif getattr(args, "let_projection", None) == "learned":
        _refuse(args, REFUSED_WITH_PROJECTION, "--let-projection learned")
    for sharding in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if getattr(args, sharding, False):
            _refuse(args, REFUSED_WITH_FSDP, f"{method} with {flag(sharding)}")


def _refuse(args: argparse.Namespace, table: Table, user: str) -> None:
    for name, (supported, reason) in table.items():
        value = getattr(args, name, supported)
        if value not in (supported, None):
            given = _FLAGS.get(name, flag(name))
            remedy = f"give {given} {supported}" if isinstance(supported, str) else f"drop {given}"
            raise LETError(f"{user} cannot be used with {given} {value}: {reason}; {remedy}.")


def check_teacher_shard(args: argparse.Namespace) -> None:
    """Check that a sharded teacher has an engine and a method that support it.

    Raises:
        LETError: names both flags.
    """
    if args.let_teacher_shard and args.engine != "deepspeed":
        raise LETError(
            f"--let-teacher-shard needs ZeRO-3 and cannot be used with --engine {args.engine}; give"
            " --engine deepspeed or drop it."
        )
    if args.let_teacher_shard and METHODS[args.let_method or "none"].learns_from == "logits":
        raise LETError(
            f"--let-teacher-shard cannot be used with --let-method {args.let_method}, which needs"
            " the teacher's output layer on every rank; drop it."
        )
