"""`--engine deepspeed`, as the entry calls it around `pretrain()`."""

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
from megatron.training.training import get_megatron_optimizer_config

from megatron_let.compat import PatchSet
from megatron_let.config.model_config import gpt_config
from megatron_let.engines.deepspeed.checkpoint_info import (
    CheckpointInfo,
    is_universal,
    plan_resume,
)
from megatron_let.engines.deepspeed.config import Config, config_from_args, zero_stage
from megatron_let.engines.deepspeed.validation import check_arguments, disable_replaced_switches
from megatron_let.errors import LETError
from megatron_let.files.names import checkpoint_name
from megatron_let.run.resume import resumed_step

if TYPE_CHECKING:
    import deepspeed

    from megatron_let.teacher.model import Sharding

__all__ = ["check_arguments", "config_from_args", "enable", "teacher_sharding"]

_TRAINING = "megatron.training.training:"


def enable(args: argparse.Namespace, cuda: bool) -> Callable[[argparse.Namespace], Any]:
    """See `Engine`; in `args`, the switches that DeepSpeed replaces are turned off.

    Raises:
        LETError: DeepSpeed is missing, its config contradicts the recipe, or the checkpoint cannot
            be resumed in this layout.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise LETError(
            "--engine deepspeed needs the package deepspeed, which is not installed; install it by"
            " bash launch/lib/environment.sh deepspeed."
        )
    config = config_from_args(args, cuda)
    disable_replaced_switches(args, print_rank_0)
    layout = CheckpointInfo(
        iteration=0,
        zero_stage=zero_stage(config),
        data_parallel_size=args.data_parallel_size,
        tensor_parallel_size=args.tensor_model_parallel_size,
    )
    resume: Path | None = None
    if iteration := resumed_step(args):
        resume = plan_resume(Path(args.load) / checkpoint_name(iteration), layout)
    if resume is not None and is_universal(resume):
        config.setdefault("checkpoint", {})["load_universal"] = True
    print_rank_0(f"megatron_let: engine DeepSpeed, ZeRO stage {layout.zero_stage}")
    _patch(args, layout, resume)
    return functools.partial(_model_config, config=config)


def teacher_sharding(args: argparse.Namespace) -> Sharding | None:
    """Return ZeRO-3's sharding of the teacher under `--let-teacher-shard`."""
    if not args.let_teacher_shard:
        return None
    from megatron_let.engines.deepspeed.teacher_sharding import TeacherSharding

    return TeacherSharding()


def _patch(args: argparse.Namespace, layout: CheckpointInfo, resume: Path | None) -> None:
    from megatron_let.engines.deepspeed import forward_backward
    from megatron_let.engines.deepspeed.checkpoint import Checkpoints
    from megatron_let.engines.deepspeed.optimizer import optimizer_of

    checkpoints = Checkpoints(args, layout, resume)
    PatchSet().apply_all(
        {
            _TRAINING + "get_forward_backward_func": forward_backward.wrap_getter,
            _TRAINING + "get_megatron_optimizer": lambda original: optimizer_of,
            _TRAINING + "save_checkpoint": lambda original: checkpoints.save,
            _TRAINING + "load_checkpoint": lambda original: checkpoints.load,
        },
    )


def _model_config(args: argparse.Namespace, config: Config) -> Any:
    """Return the student's model config, whose builder makes DeepSpeed's engine."""
    from megatron_let.engines.deepspeed.forward_backward import finalize_model_grads
    from megatron_let.engines.deepspeed.model import DeepSpeedModelConfig, zero_init

    model = gpt_config(args, DeepSpeedModelConfig)
    model.build_context = functools.partial(zero_init, config)
    model.make_engine = _engine_maker(args, config)
    model.transformer.finalize_model_grads_func = finalize_model_grads
    return model


def _engine_maker(
    args: argparse.Namespace, config: Config
) -> Callable[[torch.nn.Module], deepspeed.DeepSpeedEngine]:
    import deepspeed

    from megatron_let.engines.deepspeed import adapters

    # DeepSpeed logs hundreds of lines per rank that repeat the config.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # A collective for inference, which a CPU run would compile in its first seconds.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def make(module: torch.nn.Module) -> deepspeed.DeepSpeedEngine:
        model = unwrap_model(module)
        # On the model itself: the 16-bit wrapper's state_dict bypasses the wrapper's own hooks.
        adapters.drop_empty_extra_states(model)
        adapters.sum_gradients_over_tensor_parallel(
            module, model.config, parallel_state.get_tensor_model_parallel_group()
        )
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=adapters.param_groups(module, *get_megatron_optimizer_config(args)),
            mpu=adapters.ModelParallelUnit(),
            config=config,
            dist_init_required=False,
        )
        return engine

    return make
