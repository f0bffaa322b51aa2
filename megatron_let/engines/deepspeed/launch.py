"""`--engine deepspeed`: what the entry calls, in order, around `pretrain()`."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from megatron.training import print_rank_0
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.training import get_megatron_optimizer_config

from megatron_let.compat import PatchSet
from megatron_let.engines.deepspeed.checkpoint_info import (
    CheckpointInfo,
    Resume,
    plan_resume,
    universal_folder,
)
from megatron_let.engines.deepspeed.ds_config import (
    Config,
    complete_config,
    read_config,
    zero_stage,
)
from megatron_let.engines.deepspeed.recipe import recipe_from_args
from megatron_let.engines.deepspeed.refusals import take_over
from megatron_let.errors import LETError
from megatron_let.files.names import checkpoint_name
from megatron_let.run.resume import resumed_step

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
        LETError: DeepSpeed is missing, its config contradicts the recipe, or the checkpoint cannot
            be resumed in this layout.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise LETError(
            "--engine deepspeed needs the package deepspeed, which is not installed; install it by"
            " bash launch/lib/environment.sh deepspeed."
        )
    given = read_config(args.deepspeed_config) if args.deepspeed_config else {}
    config = complete_config(given, recipe_from_args(args), fused_adam=cuda)
    take_over(args, print_rank_0)
    layout = CheckpointInfo(
        iteration=0,
        zero_stage=zero_stage(config),
        data_parallel_size=args.data_parallel_size,
        tensor_parallel_size=args.tensor_model_parallel_size,
    )
    resume = _resume(args, layout)
    if resume is not None and resume.universal:
        config.setdefault("checkpoint", {})["load_universal"] = True
    print_rank_0(f"megatron_let: engine DeepSpeed, ZeRO stage {layout.zero_stage}")
    return _patch(args, layout, resume), config


def _resume(args: argparse.Namespace, layout: CheckpointInfo) -> Resume | None:
    """The checkpoint that the run begins with; None for a new run."""
    iteration = resumed_step(args)
    if iteration == 0:
        return None
    folder = Path(args.load) / checkpoint_name(iteration)
    return plan_resume(folder, layout, (universal_folder(folder) / "zero").is_dir())


def _patch(args: argparse.Namespace, layout: CheckpointInfo, resume: Resume | None) -> PatchSet:
    from megatron_let.engines.deepspeed import schedule
    from megatron_let.engines.deepspeed.checkpoint import Checkpoints
    from megatron_let.engines.deepspeed.optimizer import optimizer_of

    checkpoints, patches = Checkpoints(args, layout, resume), PatchSet()
    patches.apply_all(
        {
            _TRAINING + "get_forward_backward_func": schedule.wrap_getter,
            _TRAINING + "get_megatron_optimizer": lambda original: optimizer_of,
            _TRAINING + "save_checkpoint": lambda original: checkpoints.save,
            _TRAINING + "load_checkpoint": lambda original: checkpoints.load,
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
    from megatron_let.engines.deepspeed.schedule import finalize_model_grads

    model = gpt_config_from_args(args, model_config_cls=DeepSpeedModelConfig)
    model.build_context = functools.partial(zero_init, config)
    model.make_engine = _engine_maker(args, config)
    model.transformer.finalize_model_grads_func = finalize_model_grads
    return model


def _engine_maker(
    args: argparse.Namespace, config: Config
) -> Callable[[torch.nn.Module], deepspeed.DeepSpeedEngine]:
    import deepspeed

    from megatron_let.engines.deepspeed.extra_state import leave_out_empty_extra_states
    from megatron_let.engines.deepspeed.mpu import ModelParallelUnit
    from megatron_let.engines.deepspeed.param_groups import param_groups
    from megatron_let.engines.deepspeed.sequence_parallel import sum_gradients_over_tensor_parallel

    # Hundreds of lines a rank that repeat the config.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # A collective for inference, which a CPU run would compile in its first seconds.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def make(module: torch.nn.Module) -> deepspeed.DeepSpeedEngine:
        model = unwrap_model(module)
        # The 16-bit wrapper hands both to the model, past its own hooks.
        leave_out_empty_extra_states(model)
        sum_gradients_over_tensor_parallel(
            module,
            model.config,
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
