"""A teacher that does not fit beside the student: its weights sharded by ZeRO-3."""

from __future__ import annotations

import weakref
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from megatron.core import parallel_state

from megatron_let.engines.deepspeed.mpu import ModelParallelUnit


def shard_teacher(model: torch.nn.Module) -> torch.nn.Module:
    """Shard a frozen model over the data-parallel ranks, each layer gathered as it runs.

    Every replica runs the teacher on as many microbatches, so its ranks gather together. No device
    ever holds the whole model: each parameter is moved and cut by itself.

    Args:
        model: on the CPU, whole on every rank, in the precision it will run in.

    Returns:
        The same module, with ZeRO-3's hooks.
    """
    config = _config(next(model.parameters()).dtype)
    deepspeed.zero.Init(
        module=model,
        data_parallel_group=parallel_state.get_data_parallel_group(),
        config_dict_or_path=config,
        mpu=ModelParallelUnit(),
    )
    # Without an optimizer DeepSpeed's engine only gathers and releases, which it does by hooks.
    deepspeed.initialize(
        model=model, config=config, mpu=ModelParallelUnit(), dist_init_required=False
    )
    _hold_weakly(model)
    return model


def _hold_weakly(model: torch.nn.Module) -> None:
    """Let the model go when its user does: DeepSpeed's list of modules would keep it for good."""
    proxy = weakref.proxy(model)
    FWD_MODULE_STACK[:] = [proxy if module is model else module for module in FWD_MODULE_STACK]

    def forget() -> None:
        FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not proxy]

    weakref.finalize(model, forget)


def _config(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": None,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3},
    }
