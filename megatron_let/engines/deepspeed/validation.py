"""Validation of Megatron's arguments for the DeepSpeed engine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from megatron_let.config.arguments import flag
from megatron_let.errors import LETError

_MEGATRON = "use --engine megatron, which supports it"

# Megatron's argument -> its supported values, and why no other or what to do.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "pipeline_model_parallel_size": ((1,), f"DeepSpeed's ZeRO has no pipelines; {_MEGATRON}"),
    "virtual_pipeline_model_parallel_size": (
        (None,),
        f"DeepSpeed's ZeRO has no pipelines; {_MEGATRON}",
    ),
    "context_parallel_size": (
        (1,),
        f"DeepSpeed averages gradients over data-parallel ranks only; {_MEGATRON}",
    ),
    "expert_model_parallel_size": ((1,), f"experts need a separate gradient average; {_MEGATRON}"),
    "num_experts": ((None,), f"mixtures of experts are untested; {_MEGATRON}"),
    "rampup_batch_size": (
        (None,),
        f"DeepSpeed's batch size is fixed when its engine is built; {_MEGATRON}",
    ),
    "step_batch_size_schedule": (
        (None,),
        f"DeepSpeed's batch size is fixed when its engine is built; {_MEGATRON}",
    ),
    "decrease_batch_size_if_needed": (
        (False,),
        f"DeepSpeed's batch size is fixed when its engine is built; {_MEGATRON}",
    ),
    "calculate_per_token_loss": (
        (False,),
        f"DeepSpeed averages over microbatches, not over tokens; {_MEGATRON}",
    ),
    "let_projection": (
        (None, "interpolate"),
        f"its linear layer is trained by Megatron's optimizer step; {_MEGATRON}",
    ),
    "fp16": ((False,), "it is untested; use --bf16"),
    "optimizer": (("adam",), "give --optimizer adam"),
    "decoupled_weight_decay": ((True,), f"only AdamW is supported; {_MEGATRON}"),
    "optimizer_cpu_offload": (
        (False,),
        "set zero_optimization.offload_optimizer in --deepspeed-config instead",
    ),
    "use_precision_aware_optimizer": (
        (False,),
        f"DeepSpeed's master weights are fp32; {_MEGATRON}",
    ),
    "use_megatron_fsdp": ((False,), "shard by ZeRO-3 or by FSDP, not by both"),
    "use_torch_fsdp2": ((False,), "shard by ZeRO-3 or by FSDP, not by both"),
    "log_params_norm": ((False,), f"each rank has only shards under ZeRO; {_MEGATRON}"),
    "log_num_zeros_in_grad": ((False,), f"DeepSpeed does not count them; {_MEGATRON}"),
    "check_weight_hash_across_dp_replicas_interval": (
        (None,),
        f"ZeRO's replicas hold different shards; {_MEGATRON}",
    ),
    "save_wgrads_interval": ((None,), f"DeepSpeed keeps no main_grad; {_MEGATRON}"),
    "rerun_mode": (
        ("validate_results", "disabled"),
        "DeepSpeed cannot repeat every step; give validate_results",
    ),
    "non_persistent_save_interval": (
        (None,),
        f"DeepSpeed writes persistent checkpoints only; {_MEGATRON}",
    ),
    "data_parallel_random_init": ((False,), f"replicas start from the same weights; {_MEGATRON}"),
    "finetune": ((False,), "the engine only resumes its own checkpoints; drop --finetune"),
    "pretrained_checkpoint": ((None,), f"the engine only resumes its own checkpoints; {_MEGATRON}"),
    "no_load_optim": ((None, False), f"it loads weights and moments together; {_MEGATRON}"),
    "no_save_optim": ((None, False), f"it saves weights and moments together; {_MEGATRON}"),
    "ckpt_convert_format": ((None,), _MEGATRON),
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
            raise LETError(f"--engine deepspeed cannot be used with {given} {value}: {reason}.")


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
