"""Megatron flags that LET or this entry cannot honour, refused before Megatron reads them."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_let.errors import LETError


def check_teacher_shard(args: argparse.Namespace) -> None:
    """Refuse a sharded teacher without ZeRO.

    Raises:
        LETError: names both flags.
    """
    if args.let_teacher_shard and args.engine != "deepspeed":
        raise LETError(
            f"--let-teacher-shard is ZeRO-3's and cannot be used with --engine {args.engine}; give"
            " --engine deepspeed or drop it."
        )
    if args.let_teacher_shard and args.let_method not in (None, "none", "let"):
        raise LETError(
            f"--let-teacher-shard cannot be used with --let-method {args.let_method}, which needs"
            " the teacher's output layer on every rank; drop it."
        )


# Flag value under which LET cannot work -> why, and what to do.
_REFUSED: tuple[tuple[str, Any, str], ...] = (
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
    ("use_megatron_fsdp", False, "it was never tried; use --use-distributed-optimizer"),
    ("use_torch_fsdp2", False, "it was never tried; use --use-distributed-optimizer"),
    ("sft", False, "the teacher sees whole sequences, not packed ones; drop --sft"),
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
    ("gtp_weight_remat_size", 1, "it was never tried; drop --tensor-parallel-num-weight-shards"),
)


_FLAG_NAMES = {"gtp_weight_remat_size": "--tensor-parallel-num-weight-shards"}


# The same for a learned projection.
_REFUSED_WITH_PROJECTION: tuple[tuple[str, Any, str], ...] = (
    ("optimizer", "adam", "its linear layer is trained by Adam; give --optimizer adam"),
    (
        "optimizer_cuda_graph",
        False,
        "its update is in the optimizer's step; drop --optimizer-cuda-graph",
    ),
    (
        "ckpt_format",
        "torch_dist",
        "only such checkpoints hold what is not the model's own; give --ckpt-format torch_dist",
    ),
    (
        "ckpt_assume_constant_structure",
        False,
        "it leaves the checkpoints at --let-stop-step; drop --ckpt-assume-constant-structure",
    ),
    (
        "non_persistent_save_interval",
        None,
        "it is not read from such checkpoints; drop --non-persistent-save-interval",
    ),
)


# The same for the methods that learn from the teacher's logits.
_REFUSED_WITH_LOGITS: tuple[tuple[str, Any, str], ...] = (
    ("mtp_num_layers", None, "the teacher predicts one token ahead; drop --mtp-num-layers"),
)


def check_supported(args: argparse.Namespace) -> None:
    """Refuse Megatron flags under which the teacher would be bypassed or wrong.

    Raises:
        LETError: names the flag and what to do.
    """
    method = f"--let-method {args.let_method}"
    _refuse(args, _REFUSED, method)
    if args.let_method != "let":
        _refuse(args, _REFUSED_WITH_LOGITS, method)
    elif getattr(args, "let_projection", None) == "learned":
        _refuse(args, _REFUSED_WITH_PROJECTION, "--let-projection learned")


def _refuse(
    args: argparse.Namespace, rows: tuple[tuple[str, Any, str], ...], with_what: str
) -> None:
    for name, allowed, reason in rows:
        value = getattr(args, name, allowed)
        if value not in (allowed, None):
            flag = _FLAG_NAMES.get(name, "--" + name.replace("_", "-"))
            raise LETError(f"{with_what} cannot be used with {flag} {value}: {reason}.")


# What the entry's own forward step does not do; a user's script with LET may.
_NOT_IN_THE_ENTRY = (
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
    """Refuse flags that the entry would read and not act on.

    Raises:
        LETError: names the flag.
    """
    for name in _NOT_IN_THE_ENTRY:
        if getattr(args, name, None):
            flag = "--" + name.replace("_", "-")
            raise LETError(
                f"{flag} is not part of this entry; use it in a training script of your own with"
                " the three lines of megatron_let.integration."
            )
