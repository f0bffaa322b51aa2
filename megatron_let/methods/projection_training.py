"""A learned projection in a run: made before the first step, trained, and gone at S_stop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config, unwrap_model

from megatron_let.checkpoint.parameter_mapping import PROJECTION
from megatron_let.checkpoint.torch_dist import FORMAT, TorchDist
from megatron_let.errors import LETError
from megatron_let.methods.learned_projection import AdamStep, LearnedProjection
from megatron_let.methods.let_context import owned_layer


class ProjectionTraining:
    """Keeps a `LearnedProjection` on the ranks of the stage that owns layer k.

    There its tensors are buffers of the model chunk, which is how Megatron's checkpoints come to
    hold it, and it takes its step within Megatron's optimizer step, or none where Megatron takes
    none. It is no child of the chunk: Megatron's data parallelism has counted the modules before.

    Attributes:
        module: the projection; None on other stages, before the set-up and after the last step.
    """

    def __init__(
        self,
        layer: int,
        teacher_width: int,
        seed: int,
        loaded_checkpoint: Callable[[], Path | None],
        is_last_step: Callable[[], bool],
        report: Callable[[str], None],
    ) -> None:
        """
        Args:
            layer: k.
            teacher_width: d_T.
            seed: `--seed`.
            loaded_checkpoint: after the set-up, the folder that the run goes on from.
            is_last_step: whether the weight of the next step is 0.
            report: prints one line on one rank.
        """
        self._layer = layer
        self._teacher_width = teacher_width
        self._seed = seed
        self._loaded_checkpoint = loaded_checkpoint
        self._is_last_step = is_last_step
        self._report = report
        self._scale: float | None = None
        self._free: Callable[[], None] | None = None
        self.module: LearnedProjection | None = None

    def wrap_setup(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Stand in for `setup_model_and_optimizer`."""

        @functools.wraps(original)
        def setup(*args: Any, **kwargs: Any) -> Any:
            model, optimizer, scheduler = original(*args, **kwargs)
            if optimizer is not None:
                self._set_up(model, optimizer)
            return model, optimizer, scheduler

        return setup

    def open_step(self, weight: float, num_tokens: int) -> None:
        """Begin a global batch, perhaps one that is taken again.

        Args:
            weight: lambda(s).
            num_tokens: of the global batch, over all replicas.
        """
        if self.module is not None:
            self.module.gradient.zero_()
            self._scale = weight / num_tokens

    def free(self) -> None:
        """Take the projection from model and optimizer; nothing where it is gone or never was."""
        if self._free is not None:
            self._free()
            self._free = self.module = None

    def _set_up(self, model: list[torch.nn.Module], optimizer: Any) -> None:
        saved = self._saved()
        self._report(
            f"LET: layer {self._layer} is projected to the teacher's width by a linear layer, "
            + ("which begins anew" if saved is None else f"loaded from {saved.folder}")
        )
        found = owned_layer(model, self._layer)
        if found is None:
            return
        chunk, config = unwrap_model(model)[found[0]], get_model_config(model[0])
        device = next(chunk.parameters()).device
        module = LearnedProjection(
            config.hidden_size, self._teacher_width, config.init_method_std, self._seed, device
        )
        if saved is not None:
            _load(module, saved)
        state = {f"{PROJECTION}_{name}": tensor for name, tensor in module.state_dict().items()}
        for name, tensor in state.items():
            chunk.register_buffer(name, tensor)
        # On the object, where it hides the method of its class, as Megatron does for CUDA graphs.
        group = _ranks_with_tokens(config.sequence_parallel)
        optimizer.step = functools.partial(self._step, optimizer, group, optimizer.step)
        self.module = module
        self._free = functools.partial(_detach, chunk, list(state), optimizer)

    def _saved(self) -> TorchDist | None:
        """The checkpoint that the run goes on from, if it holds a projection."""
        folder = self._loaded_checkpoint()
        if folder is None or not (folder / FORMAT).is_file():
            return None
        checkpoint = TorchDist(folder)
        shape = checkpoint.projection_shape()
        if shape is not None and shape[0] != self._teacher_width:
            raise LETError(
                f"The checkpoint {folder} projects to a teacher of width {shape[0]} and"
                f" --let-teacher has {self._teacher_width}; give the teacher that it was trained"
                " with, or begin a new run with --finetune.",
                collective=True,
            )
        return None if shape is None else checkpoint

    def _step(
        self,
        optimizer: Any,
        group: torch.distributed.ProcessGroup,
        original: Callable[[], tuple[bool, Any, Any]],
    ) -> tuple[bool, Any, Any]:
        """Stand in for the `step` of Megatron's optimizer."""
        result = original()
        updated, *_ = result
        if updated and self._scale is not None and self.module is not None:
            self.module.update(self._scale, group, _settings(optimizer))
        self._scale = None
        # Before the checkpoint of this step, which is not to hold it.
        if self._is_last_step():
            self.free()
        return result


def _detach(chunk: torch.nn.Module, names: list[str], optimizer: Any) -> None:
    for name in names:
        delattr(chunk, name)
    del optimizer.step


def _load(module: LearnedProjection, checkpoint: TorchDist) -> None:
    """Copy weight and moments, on each rank by itself: they are small and not sharded."""
    for name, buffer in module.state_dict().items():
        buffer.copy_(checkpoint.read(f"{PROJECTION}_{name}"))


def _ranks_with_tokens(sequence_parallel: bool) -> torch.distributed.ProcessGroup:
    """The stage's ranks that hold different tokens of a global batch."""
    if sequence_parallel:
        return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _settings(optimizer: Any) -> AdamStep:
    """Of the parameter group that the student's matrices are in."""
    group = next(
        group
        for group in optimizer.param_groups
        if group.get("default_config") and group.get("wd_mult", 1.0) == 1.0
    )
    config = optimizer.config
    return AdamStep(
        learning_rate=group["lr"],
        weight_decay=group["weight_decay"],
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        epsilon=config.adam_eps,
        decoupled_weight_decay=config.decoupled_weight_decay,
    )
