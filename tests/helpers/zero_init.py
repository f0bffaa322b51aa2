"""Print the dtypes of a buffer and of a weight that ZeRO-3 builds in bf16, in one process."""

from __future__ import annotations

import deepspeed
import torch

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from megatron.core import parallel_state

    from megatron_let.engines.deepspeed.model import zero_init

    parallel_state.initialize_model_parallel()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
    }

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frequencies = 1 / torch.arange(1, 9, dtype=torch.float32)
            self.weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))

    with zero_init(config):
        layer = Layer()
    print(layer.frequencies.dtype, layer.weight.ds_tensor.dtype)
