"""Save and load checkpoints with DeepSpeed's engine, in Megatron's folders and with its tracker."""

from __future__ import annotations

import argparse
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.checkpoint.constants import (
    PARAMETER_WITH_ROW_PARALLELISM_PATTERNS,
    TP_REPLICATED_PARAMETER_PATTERNS,
    UNIVERSAL_CHECKPOINT_INFO,
)
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import update_num_microbatches
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.training import print_rank_0
from megatron.training.checkpointing import (
    check_checkpoint_args,
    get_checkpoint_tracker_filename,
    get_rng_state,
    set_checkpoint_version,
)

from megatron_let.engines.deepspeed.checkpoint_info import CheckpointInfo, is_universal, write_info
from megatron_let.engines.deepspeed.model import DeepSpeedModel
from megatron_let.files.atomic import replace_folder, write_text
from megatron_let.files.names import checkpoint_name

# Version of Megatron's checkpoint format.
_VERSION = 3.0


def universal_info(module: torch.nn.Module) -> dict[str, Any]:
    """Return how `ds_to_universal` merges the tensor-parallel shards of each parameter."""
    replicated, rows = [], []
    for name, parameter in module.named_parameters():
        pattern = f"^{re.escape(name)}$"
        if not getattr(parameter, "tensor_model_parallel", False):
            replicated.append(pattern)
        elif parameter.partition_dim == 1:  # type: ignore[attr-defined]
            rows.append(pattern)
    return {
        TP_REPLICATED_PARAMETER_PATTERNS: replicated,
        PARAMETER_WITH_ROW_PARALLELISM_PATTERNS: rows,
    }


class Checkpoints:
    """Replaces Megatron's `save_checkpoint` and `load_checkpoint`.

    Args:
        args: Megatron's; loading restores the sample counters in it.
        resume: folder of the checkpoint to load; None for a new run.
    """

    def __init__(
        self, args: argparse.Namespace, layout: CheckpointInfo, resume: Path | None
    ) -> None:
        self._args = args
        self._layout = layout
        self._resume = resume

    def save(
        self,
        iteration: int,
        model: list[DeepSpeedModel],
        optimizer: Any,
        opt_param_scheduler: Any,
        num_floating_point_operations_so_far: float,
        *args: Any,
        **unused: Any,
    ) -> None:
        """Write a checkpoint under a temporary name, and rename it when it is complete."""
        (chunk,), save = model, Path(self._args.save)
        partial, folder = save / "partial", save / checkpoint_name(iteration)
        _on_first_rank(lambda: shutil.rmtree(partial, ignore_errors=True))
        state = {
            "args": self._args,
            "checkpoint_version": _VERSION,
            "iteration": iteration,
            "num_floating_point_operations_so_far": num_floating_point_operations_so_far,
            "opt_param_scheduler": opt_param_scheduler.state_dict(),
            "rng_state": _rng_state(),
            UNIVERSAL_CHECKPOINT_INFO: universal_info(chunk.engine.module),
        }
        chunk.engine.save_checkpoint(save, tag=partial.name, client_state=state, save_latest=False)
        _on_first_rank(lambda: self._finish(partial, folder, iteration))
        print_rank_0(f"  saved checkpoint from iteration {iteration:7d} to {folder}")

    def _finish(self, partial: Path, folder: Path, iteration: int) -> None:
        write_info(partial, replace(self._layout, iteration=iteration))
        replace_folder(partial, folder)
        # DeepSpeed's programs read `latest`, everything else Megatron's tracker.
        write_text(folder.parent / "latest", folder.name)
        tracker = Path(get_checkpoint_tracker_filename(folder.parent))
        previous = tracker.read_text() if tracker.is_file() else ""
        write_text(tracker, str(iteration))
        self._delete_previous(previous, iteration)

    def _delete_previous(self, previous: str, iteration: int) -> None:
        """Delete the previous checkpoint, unless `--save-retain-interval` keeps it."""
        interval = self._args.save_retain_interval
        if interval is None or not previous.isdecimal() or int(previous) == iteration:
            return
        if int(previous) % interval != 0:
            shutil.rmtree(
                Path(self._args.save) / checkpoint_name(int(previous)), ignore_errors=True
            )

    def load(
        self,
        ddp_model: list[DeepSpeedModel],
        optimizer: Any,
        opt_param_scheduler: Any,
        *args: Any,
        **unused: Any,
    ) -> tuple[int, float]:
        """Load the checkpoint that the run resumes from.

        Returns:
            Its iteration and number of floating-point operations; zeros for a new run.
        """
        if self._resume is None:
            return 0, 0.0
        folder, (chunk,) = self._resume, ddp_model
        groups = [_settings(group) for group in optimizer.param_groups]
        loaded, state = chunk.engine.load_checkpoint(folder.parent, tag=folder.name)
        assert loaded is not None, f"DeepSpeed found no checkpoint in {folder}"
        if is_universal(folder):
            _repair_universal(chunk.engine, groups)
        elif self._args.override_opt_param_scheduler:
            # The scheduler prefers a group's own limits, which are now the checkpoint's.
            for group, ours in zip(optimizer.param_groups, groups, strict=True):
                group.update({name: ours[name] for name in _SCHEDULED if name in ours})
        _replay_cpu_adam(getattr(chunk.engine.optimizer, "optimizer", chunk.engine.optimizer))
        set_checkpoint_version(_VERSION)
        check_checkpoint_args(state["args"])
        self._restore_counters(state["args"])
        opt_param_scheduler.load_state_dict(state["opt_param_scheduler"])
        if not self._args.no_load_rng:
            _restore_rng_state(state["rng_state"])
        print_rank_0(f"  loaded checkpoint {folder} at iteration {state['iteration']}")
        return state["iteration"], state["num_floating_point_operations_so_far"]

    def _restore_counters(self, saved: argparse.Namespace) -> None:
        for name in ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"):
            setattr(self._args, name, getattr(saved, name))
        update_num_microbatches(consumed_samples=saved.consumed_train_samples)


# Limits of a parameter group that `OptimizerParamScheduler` reads.
_SCHEDULED = ("max_lr", "min_lr", "start_wd", "end_wd")


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def _repair_universal(engine: deepspeed.DeepSpeedEngine, groups: list[dict[str, Any]]) -> None:
    """Restore the groups' settings and separate the step counters after a universal load.

    Under ZeRO-3 DeepSpeed 0.19.8 copies the first group's weight decay to all groups, and shares
    one step counter among all states, which torch's AdamW then advances once for each.
    """
    optimizer = engine.optimizer.optimizer
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings)
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def _replay_cpu_adam(optimizer: torch.optim.Optimizer) -> None:
    """Repeat the steps of a loaded DeepSpeed CPU Adam on a dummy parameter; others are unchanged.

    It multiplies the powers of beta step by step, and after a resume starts from `pow`
    (`Adam_Optimizer::IncrementStep`), which rounds differently. A step takes microseconds.
    """
    if not hasattr(optimizer, "ds_opt_adam"):
        return
    taken = max((int(state["step"]) for state in optimizer.state.values()), default=0)
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    parameter, gradient, first, second = (torch.zeros(1) for _ in range(4))
    for step in range(1, taken + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id,  # type: ignore[attr-defined]
            *(step, 0.0, beta1, beta2, 1.0, 0.0, True, parameter, gradient, first, second),
        )


def _on_first_rank(action: Callable[[], None]) -> None:
    if torch.distributed.get_rank() == 0:
        action()
    torch.distributed.barrier()


def _rng_state() -> dict[str, Any]:
    groups = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    )
    (state,) = get_rng_state("torch", *groups)
    return state


def _restore_rng_state(state: dict[str, Any]) -> None:
    """Restore what Megatron's `get_rng_state` returned; Megatron has no function for it."""
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    get_cuda_rng_tracker().set_states(state["rng_tracker_states"])
