"""Megatron's process groups as DeepSpeed asks for them."""

from __future__ import annotations

import torch
from megatron.core import parallel_state


class ModelParallelUnit:
    """The `mpu` of `deepspeed.initialize`: tensor parallel is Megatron's, the rest data parallel.

    It must not have `initialize_sequence_parallel`, by which DeepSpeed takes an mpu for its own
    Ulysses groups (`deepspeed/utils/groups.py`).
    """

    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of this rank's data-parallel group."""
        return torch.distributed.get_process_group_ranks(parallel_state.get_data_parallel_group())

    def get_pipeline_model_parallel_world_size(self) -> int:
        """1: pipelines are refused."""
        return 1

    def get_data_parallel_src_rank(self) -> int:
        """Global rank of the first replica."""
        return self.get_data_parallel_group_ranks()[0]
