"""The config of the student's model, from Megatron's arguments."""

from __future__ import annotations

import argparse
from typing import Any

from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models import GPTModelConfig


def gpt_config(args: argparse.Namespace, config_class: type = GPTModelConfig) -> Any:
    """Return Megatron's `gpt_config_from_args` with all arguments of the model.

    Args:
        args: result of Megatron's `parse_and_validate_args`.
        config_class: `GPTModelConfig` or a subclass without fields of its own.
    """
    config = gpt_config_from_args(args, model_config_cls=config_class)
    # Megatron 0.19.2 drops it, and every run has a factor of 8.
    config.rope_scaling_factor = args.rope_scaling_factor
    return config
