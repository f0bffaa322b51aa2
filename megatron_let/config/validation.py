"""Megatron flags that LET does not support, refused before training starts."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from megatron_let.config.arguments import flag
from megatron_let.config.hybrid_pattern import pattern_layers
from megatron_let.config.let_config import METHODS
from megatron_let.errors import LETError

# Megatron argument -> the only supported value, and the reason.
Table = dict[str, tuple[Any, str]]

# For every method.
REFUSED: Table = {
    "cuda_graph_impl": ("none", "CUDA graphs bypass the hook on layer k"),
    "overlap_moe_expert_parallel_comm": (False, "its schedule bypasses the hook on layer k"),
    "moe_expert_rank_capacity_factor": (None, "it runs a step twice, outside LET"),
    "sft": (False, "the teacher reads whole sequences, not packed ones"),
    "dataloader_inter_document_masking": (
        False,
        "it packs a microbatch into one row; --reset-attention-mask masks within each row",
    ),
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
# What Megatron's HybridModel, its builder or its stack do not read, or read of entries.
_IGNORED, _BY_SPEC = "HybridModel ignores it", "its layers have a fixed spec, which ignores it"
_BY_ENTRY = "it would count entries, not layers"
REFUSED_WITH_HYBRID: Table = {
    "use_rope_scaling": (False, _IGNORED),
    "rotary_interleaved": (False, "HybridModel's rotary embedding ignores it"),
    "defer_embedding_wgrad_compute": (False, _IGNORED),
    "fp8_output_proj": (False, _IGNORED),
    "cpu_offloading_num_layers": (0, _IGNORED),
    "moe_layer_freq": (1, "the E entries of the pattern are the MoE layers"),
    "mtp_num_layers": (None, "the pattern would name its layers after a /, which is not supported"),
    "linear_attention_freq": (None, "the G entries of the pattern are the linear attention"),
    "experimental_attention_variant": (None, "the pattern names the attention of each entry"),
    "qk_layernorm": (False, _BY_SPEC),
    "qk_l2_norm": (False, _BY_SPEC),
    "use_te_activation_func": (False, _BY_SPEC),
    "use_grouped_gemm_for_dense_mlp": (False, _BY_SPEC),
    "use_kitchen_attention": (False, _BY_SPEC),
    "no_rope_freq": (None, _BY_ENTRY),
    "window_attn_skip_freq": (None, _BY_ENTRY),
}
# Values that are refused for the same reason.
_REFUSED_VALUES = {
    "position_embedding_type": ("mrope", "relative"),
    "attention_backend": ("local",),
}
# Entries -> what they need.
_NEEDS_TE = "a GPU and Transformer Engine"
_NEEDED_BY = {"G": _NEEDS_TE, "D": _NEEDS_TE, "+": _NEEDS_TE}
_NEEDED_BY["M"] = "a GPU and the packages mamba-ssm and causal-conv1d"
_UNTESTED = "it is tested with data parallelism only"
_NO_CHECKPOINTS = (
    "no checkpoint of FSDP could be resumed in a test; use --use-distributed-optimizer"
)
REFUSED_WITH_FSDP: Table = {
    "tensor_model_parallel_size": (1, _UNTESTED),
    "pipeline_model_parallel_size": (1, _UNTESTED),
    "context_parallel_size": (1, _UNTESTED),
    "num_experts": (None, "it is untested"),
    "multi_latent_attention": (False, "it is untested"),
    "mtp_num_layers": (None, "it is untested"),
    "hybrid_layer_pattern": (None, "it is untested"),
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


def check_hybrid(args: argparse.Namespace) -> None:
    """Check that the entry's HybridModel honours the arguments, and that this host can build it.

    Args:
        args: parsed, before or after Megatron's validation.

    Raises:
        LETError: names the flag or the entry, and what to do.
    """
    pattern = args.hybrid_layer_pattern
    if pattern is None:
        return
    user = f"--hybrid-layer-pattern {pattern}"
    if not pattern_layers(pattern):
        raise LETError(f"{user} has no entry; give one, such as *-*-*-*-.")
    if "/" in pattern:
        raise LETError(
            f"{user} predicts further tokens from its / on, which this entry does"
            " not support; drop that part, or use a custom training script with"
            " megatron_let.integration."
        )
    _refuse(args, REFUSED_WITH_HYBRID, user)
    for name, values in _REFUSED_VALUES.items():
        value = getattr(getattr(args, name), "name", getattr(args, name))
        if value in values:
            raise LETError(f"{user} cannot be used with {flag(name)} {value}: {_IGNORED}; drop it.")
    if args.multi_latent_attention and not {"+", "D"} & set(pattern):
        raise LETError(
            f"{user} has no latent attention; give it + entries, not --multi-latent-attention."
        )
    if (args.num_experts is not None) != ("E" in pattern):
        raise LETError(
            f"{user} and --num-experts {args.num_experts} differ: experts are its E entries; give"
            " both or neither."
        )
    _check_host(args, pattern)


def _check_host(args: argparse.Namespace, pattern: str) -> None:
    """Check that the packages of the entries are installed."""
    for symbol, needed in _NEEDED_BY.items():
        if symbol == "M":
            missing = importlib.util.find_spec("mamba_ssm") is None
        else:
            missing = args.transformer_impl == "local"
        if symbol in pattern and missing:
            raise LETError(
                f"--hybrid-layer-pattern {pattern} has {symbol} entries, which need {needed}, not"
                " all of which this machine has; install them or drop these entries."
            )


def _refuse(args: argparse.Namespace, table: Table, user: str) -> None:
    for name, (supported, reason) in table.items():
        value = getattr(args, name, supported)
        if value not in (supported, None):
            given = _FLAGS.get(name, flag(name))
            remedy = f"give {given} {supported}" if isinstance(supported, str) else f"drop {given}"
            raise LETError(f"{user} cannot be used with {given} {value}: {reason}; {remedy}.")


def check_document_mask(args: argparse.Namespace) -> None:
    """Check that the student's attention uses the mask of `--reset-attention-mask`.

    Raises:
        LETError: Transformer Engine's causal attention would ignore it.
    """
    if args.reset_attention_mask and args.transformer_impl != "local":
        raise LETError(
            f"--reset-attention-mask has no effect with --transformer-impl {args.transformer_impl},"
            " whose causal attention ignores the mask of the data set; give --transformer-impl"
            " local, or drop it."
        )


def check_script_masks_documents(args: argparse.Namespace) -> None:
    """Check that a script's batches have the mask of `--reset-attention-mask` on every stage.

    Raises:
        LETError: layers of the student would attend across documents.
    """
    if not args.reset_attention_mask:
        return
    check_document_mask(args)
    chunks = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    problems = {
        "Megatron's get_batch gives no mask to the middle stages of a pipeline": chunks > 2,
        "--no-create-attention-mask-in-dataloader leaves it out": (
            not args.create_attention_mask_in_dataloader
        ),
        "the kernel of masked softmax ignores it without --no-masked-softmax-fusion": (
            args.masked_softmax_fusion
        ),
    }
    for reason, found in problems.items():
        if found:
            raise LETError(
                f"--reset-attention-mask cannot be used here: {reason}; change that, or train with"
                " the entry megatron_let.pretrain."
            )


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
