"""ZeRO-3 sharding of a teacher that does not fit into memory with the student."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from megatron.core import parallel_state

from megatron_let.engines.deepspeed.adapters import ModelParallelUnit


class TeacherSharding:
    """Shards a frozen model over the data-parallel ranks; each layer is gathered as it runs.

    The gathers are collective: every replica runs the teacher on the same number of microbatches.
    """

    def __init__(self) -> None:
        self._engine: deepspeed.DeepSpeedEngine | None = None

    def shard(self, model: torch.nn.Module) -> torch.nn.Module:
        """Shard a model; parameters move one by one, so no device holds the whole model.

        Args:
            model: complete model on the CPU of every rank, in the precision to run in.

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
        # Without an optimizer the engine only gathers and releases parameters in hooks.
        self._engine, *_ = deepspeed.initialize(
            model=model, config=config, mpu=ModelParallelUnit(), dist_init_required=False
        )
        return model

    def free(self) -> None:
        """Free the weights; DeepSpeed's caches keep the modules, which are small."""
        if self._engine is None:
            return
        self._engine.destroy()
        for parameter in self._engine.module.parameters():
            parameter.data = parameter.ds_tensor.data = parameter.data.new_empty(0)
        self._engine = None


def _config(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": None,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3},
    }
