"""`--engine deepspeed`: what the entry calls, in order, around `pretrain()`."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from megatron.training import print_rank_0
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.training import get_megatron_optimizer_config

from megatron_let.config import LETError
from megatron_let.engines.deepspeed.ds_config import Config, complete_config, read_config, zero_stage
from megatron_let.engines.deepspeed.recipe import recipe_from_args
from megatron_let.engines.deepspeed.refusals import check_supported, take_over
from megatron_let.patches import PATCHES, PatchSet

if TYPE_CHECKING:
    import deepspeed

_TRAINING = "megatron.training.training:"


def enable(args: argparse.Namespace, cuda: bool) -> tuple[PatchSet, Config]:
    """Make the coming `pretrain()` train on DeepSpeed's engine.

    Args:
        args: what Megatron's `parse_and_validate_args` returned; the switches that DeepSpeed
            takes over are turned off.
        cuda: the run is on GPUs.

    Returns:
        The applied patches, and the completed DeepSpeed config.

    Raises:
        LETError: DeepSpeed is missing, a flag is not possible with it, or its config contradicts
            the recipe.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise LETError(
            "--engine deepspeed needs the package deepspeed, which is not installed; install it by"
            " bash launch/lib/environment.sh deepspeed."
        )
    check_supported(args)
    given = read_config(args.deepspeed_config) if args.deepspeed_config else {}
    config = complete_config(given, recipe_from_args(args), fused_adam=cuda)
    take_over(args, print_rank_0)
    print_rank_0(f"megatron_let: engine DeepSpeed, ZeRO stage {zero_stage(config)}")
    return _patch(), config


def _patch() -> PatchSet:
    from megatron_let.engines.deepspeed import schedule
    from megatron_let.engines.deepspeed.optimizer import optimizer_of

    patches = PatchSet()
    patches.apply_all(
        PATCHES,
        {
            _TRAINING + "get_forward_backward_func": schedule.wrap_getter,
            _TRAINING + "get_megatron_optimizer": lambda original: optimizer_of,
        },
    )
    return patches


def model_config(args: argparse.Namespace, config: Config) -> Any:
    """The student's model config, whose builder makes DeepSpeed's engine.

    Args:
        args: Megatron's.
        config: the completed DeepSpeed config.
    """
    from megatron_let.engines.deepspeed.model import DeepSpeedModelConfig, zero_init

    model = gpt_config_from_args(args, model_config_cls=DeepSpeedModelConfig)
    model.build_context = functools.partial(zero_init, config)
    model.make_engine = _engine_maker(args, config)
    return model


def _engine_maker(
    args: argparse.Namespace, config: Config
) -> Callable[[torch.nn.Module], deepspeed.DeepSpeedEngine]:
    import deepspeed

    from megatron_let.engines.deepspeed.mpu import ModelParallelUnit
    from megatron_let.engines.deepspeed.param_groups import param_groups
    from megatron_let.engines.deepspeed.sequence_parallel import sum_gradients_over_tensor_parallel

    # Hundreds of lines a rank that repeat the config.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

    def make(module: torch.nn.Module) -> deepspeed.DeepSpeedEngine:
        sum_gradients_over_tensor_parallel(
            module,
            unwrap_model(module).config,
            parallel_state.get_tensor_model_parallel_group(),
        )
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=param_groups(module, *get_megatron_optimizer_config(args)),
            mpu=ModelParallelUnit(),
            config=config,
            dist_init_required=False,
        )
        return engine

    return make
