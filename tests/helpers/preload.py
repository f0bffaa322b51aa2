"""What the entry imports, imported in a process whose forks are ranks.

The entry itself is left out, because each rank runs it as `__main__`.
"""

# ruff: noqa: E402, F401
import argparse
import contextlib
import functools
import gc
import warnings

import torch

from megatron_let.compat.device import detect_host, prepare_process

# A fork has only the thread that called fork(), and would wait for the others.
torch.set_num_threads(1)
prepare_process(detect_host(), 0)

import megatron.core.datasets.gpt_dataset
import megatron.core.models.mimo.comm.colocated_communicator
import megatron.core.optimizer.distrib_optimizer
import megatron.core.tokenizers.text.libraries
import torch._dynamo.trace_rules
import torch.utils.tensorboard
import transformers.models.llama.modeling_llama
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import add_megatron_arguments
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import megatron_let.checkpoint.load_check
import megatron_let.compat.apply
import megatron_let.compat.changed_schedule
import megatron_let.compat.local_hybrid
import megatron_let.config.command_line
import megatron_let.config.run_settings
import megatron_let.data.gpt
import megatron_let.engines.megatron
import megatron_let.integration
import megatron_let.losses.cosine
import megatron_let.methods.forward_step
import megatron_let.run.unsaved

with contextlib.suppress(ModuleNotFoundError):
    # Gone in Megatron 0.20.
    import megatron.core.tokenizers.text.models

# Tables that each rank would build once more: transformers' when it loads a model, torch's when it
# calls a compiled function, and Megatron's docstrings of 26 classes, for each of three parsers.
get_checkpoint_conversion_mapping("llama")
torch._dynamo.trace_rules.get_torch_obj_rule_map()
read_docstrings = ArgumentGroupFactory._get_field_docstrings


@functools.cache
def docstrings(config: type) -> dict[str, str]:
    return read_docstrings(ArgumentGroupFactory, config)


ArgumentGroupFactory._get_field_docstrings = staticmethod(docstrings)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))

# Otherwise each rank copies the pages of all these objects when it collects garbage.
gc.collect()
gc.freeze()
