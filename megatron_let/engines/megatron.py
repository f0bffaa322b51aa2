"""`--engine megatron`: Megatron's DDP and optimizers; nothing is patched."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_let.engines.deepspeed.checkpoint_info import refuse_deepspeed_checkpoint
from megatron_let.files.names import checkpoint_name
from megatron_let.run.resume import resumed_step


def check_arguments(args: argparse.Namespace) -> None:
    """See `Engine`; every argument is supported."""


def config_from_args(args: argparse.Namespace, cuda: bool) -> dict[str, Any]:
    """See `Engine`; there is no config."""
    return {}


def enable(args: argparse.Namespace, cuda: bool) -> Callable[[argparse.Namespace], Any]:
    """See `Engine`.

    Raises:
        LETError: `--load` has a checkpoint of the DeepSpeed engine.
    """
    from megatron.training.argument_utils import hybrid_config_from_args

    from megatron_let.config.model_config import gpt_config

    if args.load is not None:
        refuse_deepspeed_checkpoint(Path(args.load) / checkpoint_name(resumed_step(args)))
    return gpt_config if args.hybrid_layer_pattern is None else hybrid_config_from_args


def teacher_sharding(args: argparse.Namespace) -> None:
    """See `Engine`; the teacher is replicated on every rank."""
