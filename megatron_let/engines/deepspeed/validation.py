"""Validation of Megatron's arguments for the DeepSpeed engine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from megatron_let.config.arguments import flag
from megatron_let.errors import LETError

_NO_PIPELINES = "DeepSpeed's ZeRO has no pipelines"
_FIXED_BATCH = "DeepSpeed's batch size is fixed when its engine is built"
_ONLY_RESUMES = "the engine only resumes its own checkpoints"

# Megatron's argument -> its supported values, and why no other; what to do after a semicolon, else
# Megatron's engine.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "pipeline_model_parallel_size": ((1,), _NO_PIPELINES),
    "virtual_pipeline_model_parallel_size": ((None,), _NO_PIPELINES),
    "context_parallel_size": ((1,), "DeepSpeed averages gradients over data-parallel ranks only"),
    "expert_model_parallel_size": ((1,), "experts need a separate gradient average"),
    "hybrid_layer_pattern": ((None,), "it builds Megatron's GPTModel"),
    "num_experts": ((None,), "mixtures of experts are untested"),
    "multi_latent_attention": ((False,), "latent attention is untested"),
    "mtp_num_layers": ((None,), "multi-token prediction is untested"),
    "attention_output_gate": ((False,), "gated attention is untested"),
    "rampup_batch_size": ((None,), _FIXED_BATCH),
    "step_batch_size_schedule": ((None,), _FIXED_BATCH),
    "decrease_batch_size_if_needed": ((False,), _FIXED_BATCH),
    "calculate_per_token_loss": ((False,), "DeepSpeed averages over microbatches, not over tokens"),
    "let_projection": (
        (None, "interpolate"),
        "its linear layer is trained by Megatron's optimizer step",
    ),
    "fp16": ((False,), "it is untested; use --bf16"),
    "optimizer": (("adam",), "only AdamW is supported; give --optimizer adam"),
    "decoupled_weight_decay": ((True,), "only AdamW is supported"),
    "optimizer_cpu_offload": (
        (False,),
        "DeepSpeed offloads; set zero_optimization.offload_optimizer in --deepspeed-config",
    ),
    "use_precision_aware_optimizer": ((False,), "DeepSpeed's master weights are fp32"),
    "use_megatron_fsdp": ((False,), "ZeRO-3 shards already; drop it"),
    "use_torch_fsdp2": ((False,), "ZeRO-3 shards already; drop it"),
    "log_params_norm": ((False,), "each rank has only shards under ZeRO"),
    "log_num_zeros_in_grad": ((False,), "DeepSpeed does not count them"),
    "check_weight_hash_across_dp_replicas_interval": (
        (None,),
        "ZeRO's replicas hold different shards",
    ),
    "save_wgrads_interval": ((None,), "DeepSpeed keeps no main_grad"),
    "rerun_mode": (
        ("validate_results", "disabled"),
        "DeepSpeed cannot repeat every step; give validate_results",
    ),
    "non_persistent_save_interval": ((None,), "DeepSpeed writes persistent checkpoints only"),
    "data_parallel_random_init": ((False,), "replicas start from the same weights"),
    "finetune": ((False,), f"{_ONLY_RESUMES}; drop it"),
    "pretrained_checkpoint": ((None,), _ONLY_RESUMES),
    "no_load_optim": ((None, False), "it loads weights and moments together"),
    "no_save_optim": ((None, False), "it saves weights and moments together"),
    "ckpt_convert_format": ((None,), "DeepSpeed's checkpoints have one format"),
}
# Flags that are not named like their argument.
_FLAGS = {
    "virtual_pipeline_model_parallel_size": "--num-layers-per-virtual-pipeline-stage",
    "decoupled_weight_decay": "--no-decoupled-weight-decay",
}


def check_arguments(args: argparse.Namespace) -> None:
    """Check for flags of Megatron that the DeepSpeed engine does not support.

    Raises:
        LETError: names the flag, its value and what to do.
    """
    for name, (supported, reason) in UNSUPPORTED.items():
        value = getattr(args, name, supported[0])
        if value not in supported:
            given = _FLAGS.get(name, flag(name))
            remedy = "" if ";" in reason else "; use --engine megatron, which supports it"
            raise LETError(
                f"--engine deepspeed cannot be used with {given} {value}: {reason}{remedy}."
            )


# Switches of Megatron's data parallelism and checkpoints -> what replaces them.
_REPLACED = {
    "use_distributed_optimizer": "ZeRO-1 or the stage in --deepspeed-config",
    "overlap_grad_reduce": "zero_optimization.overlap_comm",
    "overlap_param_gather": "ZeRO's gathers",
    "async_save": "DeepSpeed's synchronous save",
    "use_persistent_ckpt_worker": "DeepSpeed's synchronous save",
}


def disable_replaced_switches(args: argparse.Namespace, report: Callable[[str], None]) -> None:
    """Turn off the switches whose work DeepSpeed does, and report them in one line.

    Call it after the recipe was read from `args`.
    """
    replaced = [name for name in _REPLACED if getattr(args, name)]
    for name in replaced:
        setattr(args, name, False)
    if replaced:
        names = "; ".join(f"{flag(name)} by {_REPLACED[name]}" for name in replaced)
        report(f"DeepSpeed replaces {names}")
