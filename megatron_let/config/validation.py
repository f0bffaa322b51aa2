"""Megatron flags that LET or this entry does not support, refused before training starts."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_let.errors import LETError


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
    if args.let_teacher_shard and args.let_method not in (None, "none", "let"):
        raise LETError(
            f"--let-teacher-shard cannot be used with --let-method {args.let_method}, which needs"
            " the teacher's output layer on every rank; drop it."
        )


# Megatron argument, the only value that every method supports, and why with what to do.
REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("cuda_graph_impl", "none", "CUDA graphs bypass the hook on layer k; drop --cuda-graph-impl"),
    (
        "overlap_moe_expert_parallel_comm",
        False,
        "its schedule bypasses the hook on layer k; drop --overlap-moe-expert-parallel-comm",
    ),
    (
        "moe_expert_rank_capacity_factor",
        None,
        "it runs a step twice, outside LET; drop --moe-expert-rank-capacity-factor",
    ),
    ("hybrid_layer_pattern", None, "hybrid models have no k-th transformer layer; use a GPT model"),
    ("use_megatron_fsdp", False, "it is untested; use --use-distributed-optimizer"),
    ("use_torch_fsdp2", False, "it is untested; use --use-distributed-optimizer"),
    ("sft", False, "the teacher reads whole sequences, not packed ones; drop --sft"),
    (
        "reset_attention_mask",
        False,
        "the teacher attends across documents; drop --reset-attention-mask",
    ),
    (
        "reset_position_ids",
        False,
        "the teacher counts positions from the sequence's start; drop --reset-position-ids",
    ),
    (
        "dataloader_inter_document_masking",
        False,
        "the teacher attends across documents; drop --dataloader-inter-document-masking",
    ),
    (
        "hybrid_context_parallel",
        False,
        "its sequences have no fixed length; drop --hybrid-context-parallel",
    ),
    ("perform_rl_step", False, "LET is for pretraining; drop --perform-rl-step"),
    ("gtp_weight_remat_size", 1, "it is untested; drop --tensor-parallel-num-weight-shards"),
)


# The same for a learned projection.
REFUSED_WITH_PROJECTION: tuple[tuple[str, Any, str], ...] = (
    ("optimizer", "adam", "its linear layer is trained by Adam; give --optimizer adam"),
    (
        "optimizer_cuda_graph",
        False,
        "its update is in the optimizer's step; drop --optimizer-cuda-graph",
    ),
    (
        "ckpt_format",
        "torch_dist",
        "only this format stores more than the model's weights; give --ckpt-format torch_dist",
    ),
    (
        "ckpt_assume_constant_structure",
        False,
        "checkpoints change at --let-stop-step; drop --ckpt-assume-constant-structure",
    ),
    (
        "non_persistent_save_interval",
        None,
        "such checkpoints do not store it; drop --non-persistent-save-interval",
    ),
)


# The same for the methods that distill the teacher's logits.
REFUSED_WITH_LOGITS: tuple[tuple[str, Any, str], ...] = (
    ("mtp_num_layers", None, "the teacher predicts one token ahead; drop --mtp-num-layers"),
)


# Arguments whose flag has another name.
_FLAG_NAMES = {"gtp_weight_remat_size": "--tensor-parallel-num-weight-shards"}


def check_supported(args: argparse.Namespace) -> None:
    """Check that no Megatron flag bypasses the teacher or changes its input.

    Raises:
        LETError: names the flag and what to do.
    """
    if args.let_method in (None, "none"):
        return
    method = f"--let-method {args.let_method}"
    _refuse(args, REFUSED, method)
    if args.let_method != "let":
        _refuse(args, REFUSED_WITH_LOGITS, method)
    elif getattr(args, "let_projection", None) == "learned":
        _refuse(args, REFUSED_WITH_PROJECTION, "--let-projection learned")


def _refuse(args: argparse.Namespace, rows: tuple[tuple[str, Any, str], ...], user: str) -> None:
    for name, allowed, reason in rows:
        value = getattr(args, name, allowed)
        if value not in (allowed, None):
            flag = _FLAG_NAMES.get(name, "--" + name.replace("_", "-"))
            raise LETError(f"{user} cannot be used with {flag} {value}: {reason}.")


# Flags that the entry's forward step does not implement; a user's script with LET may.
NOT_IN_THE_ENTRY = (
    "yaml_cfg",
    "sft",
    "fim_data",
    "mtp_num_layers",
    "hybrid_layer_pattern",
    "dataloader_inter_document_masking",
    "hybrid_context_parallel",
    "perform_rl_step",
    "logits_load_dir",
    "heterogeneous_layers_config_path",
    "vision_pretraining",
)


def check_entry_supports(args: argparse.Namespace) -> None:
    """Check that the entry acts on every flag that was given.

    Raises:
        LETError: names the flag.
    """
    for name in NOT_IN_THE_ENTRY:
        if getattr(args, name, None):
            flag = "--" + name.replace("_", "-")
            raise LETError(
                f"{flag} is not supported by this entry; use it in your own training script with"
                " the three lines of megatron_let.integration."
            )
