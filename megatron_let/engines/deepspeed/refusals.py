"""What the DeepSpeed engine does not do, refused before any work; and what it does its own way."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from megatron_let.errors import LETError

_MEGATRON = "use --engine megatron, which has it"

# Megatron's argument -> the values that are possible, the flag, and what to do.
_REFUSED: tuple[tuple[str, tuple[Any, ...], str, str], ...] = (
    (
        "pipeline_model_parallel_size",
        (1,),
        "--pipeline-model-parallel-size",
        f"DeepSpeed's ZeRO has no pipelines; {_MEGATRON}",
    ),
    (
        "virtual_pipeline_model_parallel_size",
        (None,),
        "--num-layers-per-virtual-pipeline-stage",
        f"DeepSpeed's ZeRO has no pipelines; {_MEGATRON}",
    ),
    (
        "context_parallel_size",
        (1,),
        "--context-parallel-size",
        f"DeepSpeed averages gradients over data-parallel ranks only; {_MEGATRON}",
    ),
    (
        "expert_model_parallel_size",
        (1,),
        "--expert-model-parallel-size",
        f"experts need a gradient average of their own; {_MEGATRON}",
    ),
    ("num_experts", (None,), "--num-experts", f"mixtures of experts were never tried; {_MEGATRON}"),
    (
        "rampup_batch_size",
        (None,),
        "--rampup-batch-size",
        f"DeepSpeed's batch size is fixed when its engine is made; {_MEGATRON}",
    ),
    (
        "step_batch_size_schedule",
        (None,),
        "--step-batch-size-schedule",
        f"DeepSpeed's batch size is fixed when its engine is made; {_MEGATRON}",
    ),
    (
        "decrease_batch_size_if_needed",
        (False,),
        "--decrease-batch-size-if-needed",
        f"DeepSpeed's batch size is fixed when its engine is made; {_MEGATRON}",
    ),
    (
        "calculate_per_token_loss",
        (False,),
        "--calculate-per-token-loss",
        f"DeepSpeed averages over microbatches, whatever tokens they count; {_MEGATRON}",
    ),
    (
        "let_projection",
        (None, "interpolate"),
        "--let-projection",
        f"its linear layer is trained beside Megatron's optimizer; {_MEGATRON}",
    ),
    ("fp16", (False,), "--fp16", "it was never tried; use --bf16"),
    ("optimizer", ("adam",), "--optimizer", "give --optimizer adam"),
    (
        "decoupled_weight_decay",
        (True,),
        "--no-decoupled-weight-decay",
        f"the optimizer is AdamW; {_MEGATRON}",
    ),
    (
        "optimizer_cpu_offload",
        (False,),
        "--optimizer-cpu-offload",
        "offload by zero_optimization.offload_optimizer in --deepspeed-config",
    ),
    (
        "use_precision_aware_optimizer",
        (False,),
        "--use-precision-aware-optimizer",
        f"DeepSpeed's masters are fp32; {_MEGATRON}",
    ),
    ("use_megatron_fsdp", (False,), "--use-megatron-fsdp", "shard by ZeRO-3 or by FSDP, not both"),
    ("use_torch_fsdp2", (False,), "--use-torch-fsdp2", "shard by ZeRO-3 or by FSDP, not both"),
    ("log_params_norm", (False,), "--log-params-norm", f"it would see shards; {_MEGATRON}"),
    (
        "log_num_zeros_in_grad",
        (False,),
        "--log-num-zeros-in-grad",
        f"DeepSpeed does not count them; {_MEGATRON}",
    ),
    (
        "check_weight_hash_across_dp_replicas_interval",
        (None,),
        "--check-weight-hash-across-dp-replicas-interval",
        f"ZeRO's replicas hold different shards; {_MEGATRON}",
    ),
    (
        "save_wgrads_interval",
        (None,),
        "--save-wgrads-interval",
        f"DeepSpeed keeps no main_grad; {_MEGATRON}",
    ),
    (
        "rerun_mode",
        ("validate_results", "disabled"),
        "--rerun-mode",
        "DeepSpeed cannot take every step twice; give validate_results",
    ),
    (
        "non_persistent_save_interval",
        (None,),
        "--non-persistent-save-interval",
        f"DeepSpeed writes whole checkpoints only; {_MEGATRON}",
    ),
    (
        "data_parallel_random_init",
        (False,),
        "--data-parallel-random-init",
        f"replicas begin with the same weights; {_MEGATRON}",
    ),
    ("finetune", (False,), "--finetune", "it resumes its own checkpoints only; drop --finetune"),
    (
        "pretrained_checkpoint",
        (None,),
        "--pretrained-checkpoint",
        f"it resumes its own checkpoints only; {_MEGATRON}",
    ),
    (
        "no_load_optim",
        (None, False),
        "--no-load-optim",
        f"weights and moments come together; {_MEGATRON}",
    ),
    (
        "no_save_optim",
        (None, False),
        "--no-save-optim",
        f"weights and moments go together; {_MEGATRON}",
    ),
    ("ckpt_convert_format", (None,), "--ckpt-convert-format", _MEGATRON),
)


def check_supported(args: argparse.Namespace) -> None:
    """Refuse Megatron flags that DeepSpeed's engine would do wrongly or not at all.

    Raises:
        LETError: names the flag, its value and what to do.
    """
    for name, possible, flag, reason in _REFUSED:
        value = getattr(args, name, possible[0])
        if value not in possible:
            raise LETError(f"--engine deepspeed cannot be used with {flag} {value}: {reason}.")


# Switches of Megatron's own data parallelism and checkpoints -> what DeepSpeed does instead.
_TAKEN_OVER = {
    "use_distributed_optimizer": "ZeRO-1 or the stage in --deepspeed-config",
    "overlap_grad_reduce": "zero_optimization.overlap_comm",
    "overlap_param_gather": "ZeRO's own gathers",
    "async_save": "DeepSpeed saves while training waits",
    "use_persistent_ckpt_worker": "DeepSpeed saves while training waits",
}


def take_over(args: argparse.Namespace, report: Callable[[str], None]) -> None:
    """Switch off what DeepSpeed does its own way, and say so in one line.

    Call it after the recipe has been read from `args`.
    """
    taken = [name for name in _TAKEN_OVER if getattr(args, name)]
    for name in taken:
        setattr(args, name, False)
    if taken:
        names = "; ".join(f"--{name.replace('_', '-')} by {_TAKEN_OVER[name]}" for name in taken)
        report(f"DeepSpeed replaces {names}")
