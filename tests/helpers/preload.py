"""What the entry imports, imported in a process whose forks are ranks.

The entry itself is left out, because each rank runs it as `__main__`.
"""

# ruff: noqa: E402, F401
import torch

from megatron_let.compat.device import detect_host, prepare_process

# A fork has only the thread that called fork(), and would wait for the others.
torch.set_num_threads(1)
prepare_process(detect_host(), 0)

import megatron.core.optimizer.distrib_optimizer
import megatron.training
import torch.utils.tensorboard
import transformers.models.llama.modeling_llama

import megatron_let.integration
