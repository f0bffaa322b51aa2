"""Check a run's settings against the checkpoint that it loads.

Megatron compares layers, width, heads and the shapes of most tensors. Other settings would
silently change the model, or fail in the optimizer without naming a flag.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_let.checkpoint.architecture import norm_epsilon, rope_scaling_factor
from megatron_let.checkpoint.formats import (
    is_checkpoint,
    is_legacy,
    iteration_folder,
    open_checkpoint,
)
from megatron_let.checkpoint.torch_dist import FORMAT, is_torch_dist
from megatron_let.config.arguments import flag
from megatron_let.config.hybrid_pattern import without_stages
from megatron_let.errors import LETError
from megatron_let.files.names import TRACKER, checkpoint_name

# Arguments that change what the weights compute, whatever the architecture is.
ARCHITECTURE_ARGUMENTS = (
    "hybrid_layer_pattern",
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "normalization", "layernorm_epsilon", "add_bias_linear", "add_qkv_bias"),
    *("position_embedding_type", "rotary_base", "rotary_percent", "rotary_interleaved"),
    *("rotary_seq_len_interpolation_factor", "use_rope_scaling", "rope_scaling_factor"),
    *("no_rope_freq", "swiglu", "squared_relu", "quick_geglu", "glu_linear_offset"),
    *("activation_func_clamp_value", "qk_layernorm", "qk_l2_norm", "attention_output_gate"),
    *("layernorm_zero_centered_gamma", "untie_embeddings_and_output_weights", "window_size"),
    *("window_attn_skip_freq", "softmax_type", "multi_latent_attention", "q_lora_rank"),
    *("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rotary_scaling_factor"),
    *("mscale", "mscale_all_dim", "experimental_attention_variant", "linear_attention_freq"),
    *("use_mup", "mup_embedding_mult", "mup_output_mult", "num_experts", "moe_layer_freq"),
    *("moe_ffn_hidden_size", "moe_router_topk", "moe_router_score_function"),
    *("moe_router_pre_softmax", "moe_router_num_groups", "moe_router_group_topk"),
    *("moe_router_topk_scaling_factor", "moe_shared_expert_intermediate_size"),
    *("moe_shared_expert_gate", "moe_router_enable_expert_bias", "moe_expert_capacity_factor"),
    *("moe_apply_probs_on_input", "moe_latent_size", "moe_mlp_glu_interleave_size"),
    *("moe_shared_expert_glu_interleave_size", "mtp_num_layers"),
)
_FLAGS = {
    "layernorm_epsilon": "--norm-epsilon",
    "add_bias_linear": "--disable-bias-linear",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "num_query_groups": "--num-query-groups (with --group-query-attention)",
    "start_weight_decay": "--weight-decay",
}
# What Megatron's schedule is made of, in iterations and in samples.
_SCHEDULE = (
    # The weight decay's schedule is as long as the run, whatever --lr-decay-iters is.
    *("lr", "min_lr", "global_batch_size", "train_iters", "train_samples", "lr_decay_iters"),
    *("lr_decay_samples", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"),
    *("lr_decay_style", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
)

# In the parameter groups of a checkpoint, which Megatron restores whatever the arguments say.
_KEPT_BY_OPTIMIZER = ("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum")


def check_loaded(args: argparse.Namespace, tokenizer: Any) -> None:
    """Check that the settings fit the checkpoint of `--load` or `--pretrained-checkpoint`.

    Raises:
        LETError: names the flag, its value and the checkpoint's; or the checkpoint is not complete.
    """
    source, resumes = args.load, not (args.finetune or args.no_load_optim)
    if source is None or not _has_checkpoint(source, args.ckpt_step):
        source, resumes = args.pretrained_checkpoint, False
    folder = _folder_to_load(source, args.ckpt_step)
    saved = None if folder is None else open_checkpoint(folder).state.get("args")
    if folder is None or saved is None:
        return
    names: tuple[str, ...] = ARCHITECTURE_ARGUMENTS
    pattern, saved_pattern = (getattr(a, "hybrid_layer_pattern", None) for a in (args, saved))
    if pattern and not saved_pattern:
        _check_weights_only(args, folder)
        # Megatron pairs the entries with the checkpoint's layers, and counts both.
        names = tuple(n for n in names if n not in ("num_layers", "hybrid_layer_pattern"))
    _check_equal(args, saved, names, folder, "use the checkpoint's value, or train without it")
    if resumes:
        _check_schedule(args, saved, folder)
        remedy = "the optimizer's state keeps it: use the checkpoint's value, or --no-load-optim"
        _check_equal(args, saved, _KEPT_BY_OPTIMIZER, folder, remedy)
    _check_vocabulary(saved, tokenizer, folder)


def _check_weights_only(args: argparse.Namespace, folder: Path) -> None:
    """Check that a HybridModel takes nothing but weights from a checkpoint of GPTModel."""
    if not args.no_load_optim:
        raise LETError(
            f"The checkpoint {folder} holds a GPTModel, of which --hybrid-layer-pattern"
            f" {args.hybrid_layer_pattern} takes the weights only; give --no-load-optim, with"
            " --finetune to begin at step 1, or drop the pattern to continue the run."
        )


def _check_equal(
    args: argparse.Namespace,
    saved: argparse.Namespace,
    names: tuple[str, ...],
    folder: Path,
    remedy: str,
) -> None:
    difference = first_difference(args, saved, names)
    if difference is not None:
        name, ours, theirs = difference
        raise LETError(
            f"{name} is {ours} in this run and {theirs} in the checkpoint {folder}; {remedy}."
        )


def first_difference(
    args: argparse.Namespace,
    saved: argparse.Namespace,
    names: Iterable[str] = ARCHITECTURE_ARGUMENTS,
) -> tuple[str, Any, Any] | None:
    """Return the first flag that differs, of those that a checkpoint has, and both values."""
    for name in names:
        # An earlier name, under which Megatron saved it.
        if not (hasattr(saved, name) or (name == "layernorm_epsilon" and "norm_epsilon" in saved)):
            continue
        ours, theirs = _value(args, name), _value(saved, name)
        if not _same(ours, theirs):
            return _FLAGS.get(name, flag(name)), ours, theirs
    return None


def _value(args: argparse.Namespace, name: str) -> Any:
    if name == "layernorm_epsilon":
        return norm_epsilon(vars(args))
    # Without group-query attention Megatron's parser leaves it at 1.
    if name == "num_query_groups" and not getattr(args, "group_query_attention", False):
        return args.num_attention_heads
    if name == "rope_scaling_factor":
        return rope_scaling_factor(vars(args))
    value = getattr(args, name, None)
    if name == "kv_channels" and value is None:
        return args.hidden_size // args.num_attention_heads
    if name == "hybrid_layer_pattern":
        return without_stages(value)
    # Megatron sets it to the run's length only while it builds the optimizer.
    if name in ("lr_decay_iters", "lr_decay_samples") and value is None:
        return getattr(args, name.replace("lr_decay", "train"), None)
    return value


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return math.isclose(ours, theirs, rel_tol=1e-5)
    # A switch that one version stores as None and another as False is off.
    return bool((ours or None) == (theirs or None))


def _check_schedule(args: argparse.Namespace, saved: argparse.Namespace, folder: Path) -> None:
    """Check what Megatron compares with the loaded scheduler and parameter groups."""
    if args.use_checkpoint_opt_param_scheduler:
        # Megatron finds the loaded parameter groups by these two.
        args.lr, args.min_lr = getattr(saved, "lr", args.lr), getattr(saved, "min_lr", args.min_lr)
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    # Of a run by samples, Megatron derives the iterations only later.
    unused = "_iters" if args.train_samples else "_samples"
    names = tuple(name for name in _SCHEDULE if not name.endswith(unused))
    remedy = (
        "add --override-opt-param-scheduler to change the schedule, or"
        " --use-checkpoint-opt-param-scheduler to keep the checkpoint's"
    )
    _check_equal(args, saved, names, folder, remedy)


def _has_checkpoint(source: str, step: int | None) -> bool:
    """Return whether Megatron finds one: by the step that is given, or else by the tracker."""
    name = TRACKER if step is None else checkpoint_name(step)
    return (Path(source) / name).exists()


def _folder_to_load(source: str | None, step: int | None) -> Path | None:
    """Return the checkpoint that Megatron will load; None if there is none that can be checked."""
    if source is None or not _has_checkpoint(source, step):
        return None
    folder = (
        iteration_folder(Path(source)) if step is None else Path(source) / checkpoint_name(step)
    )
    # Only dist_checkpointing writes FORMAT; torch_dcp has an index of the same name.
    is_other = is_torch_dist(folder) and not (folder / FORMAT).is_file()
    can_check = is_checkpoint(folder) and not is_legacy(folder) and not is_other
    return folder if can_check else None


def _check_vocabulary(saved: argparse.Namespace, tokenizer: Any, folder: Path) -> None:
    # With a real tokenizer the size is the tokenizer's, and --vocab-size is ignored.
    is_null = getattr(saved, "tokenizer_type", None) in (None, "NullTokenizer")
    known = getattr(saved, "vocab_size" if is_null else "padded_vocab_size", None)
    if known is not None and tokenizer.vocab_size > known:
        raise LETError(
            f"The run's tokenizer has {tokenizer.vocab_size} tokens and the checkpoint {folder}"
            f" {known}; use the checkpoint's --tokenizer-model."
        )
