"""A learned linear layer from the student's width to the teacher's, and its training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.adam import adam

from megatron_let.checkpoint.parameter_mapping import PROJECTION
from megatron_let.checkpoint.torch_dist import FORMAT, TorchDist
from megatron_let.errors import LETError
from megatron_let.losses import AlignmentLoss
from megatron_let.losses.interpolation import work_dtype
from megatron_let.methods.base import TrainingRun, find_layer, unwrap_chunks

# With --seed alone W would repeat the first random numbers of the student's embedding.
_SEED_OFFSET = 7919


class LearnedProjection(torch.nn.Module):
    """`W`, `[d_T, d_M]` in fp32 without a bias, and the state of its optimizer.

    All tensors are buffers: Megatron's data parallelism, optimizers and gradient norm handle
    parameters and so ignore W, while its checkpoints save buffers.

    Attributes:
        weight: W, equal on every rank of the stage.
        exp_avg, exp_avg_sq, step: Adam's moments, and its number of updates, `[1]`.
        gradient: sum over this rank's tokens; not saved in checkpoints.
    """

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    gradient: Tensor

    def __init__(
        self, student_width: int, teacher_width: int, std: float, seed: int, device: torch.device
    ) -> None:
        """Initialise W and Adam's moments on the device.

        Args:
            student_width, teacher_width: d_M and d_T.
            std: standard deviation of W's initial values; the student's `--init-method-std`.
            seed: `--seed`; no global generator is advanced.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed + _SEED_OFFSET)
        shape = (teacher_width, student_width)
        weight = torch.empty(shape, dtype=torch.float32).normal_(0, std, generator=generator)
        self.register_buffer("weight", weight.to(device))
        for name in ("exp_avg", "exp_avg_sq"):
            self.register_buffer(name, torch.zeros_like(self.weight))
        # One dimension, because torch's planner cannot read a part of a 0-dim tensor.
        self.register_buffer("step", torch.zeros(1, dtype=torch.float32, device=device))
        self.register_buffer("gradient", torch.zeros_like(self.weight), persistent=False)

    def update(self, scale: float, group: ProcessGroup, settings: dict[str, Any]) -> None:
        """Sum the gradient over the ranks that hold different tokens, and take one Adam step.

        Args:
            scale: factor of the summed gradient, lambda(s) over the tokens of the global batch.
            group: the stage's ranks that hold different tokens.
            settings: hyperparameters of this step, torch's arguments of `adam`.
        """
        if group.size() > 1:
            torch.distributed.all_reduce(self.gradient, group=group)
        adam(
            [self.weight],
            [self.gradient.mul_(scale)],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.step.view(())],
            amsgrad=False,
            maximize=False,
            **settings,
        )


def with_projection(loss: AlignmentLoss, projection: LearnedProjection) -> AlignmentLoss:
    """Return the loss on the projected state `p = W h` in place of the interpolated state.

    With g the gradient of the loss with respect to p, the gradient of hidden is
    `grad_hidden + scale * g W`; `projection.gradient` is increased by `g^T h`, without the scale.
    Both are computed in fp32 (fp64 for fp64). As p is as wide as the teacher, nothing is
    interpolated; the reported values are those of the loss on p.
    """

    def projected(
        hidden: Tensor, teacher: Tensor, scale: Tensor, grad_hidden: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        dtype = work_dtype(hidden)
        rows, weight = hidden.flatten(0, -2).to(dtype), projection.weight.to(dtype)
        state = (rows @ weight.T).view(*hidden.shape[:-1], -1)
        one, zeros = state.new_ones(()), torch.zeros_like(state)
        direction, values = loss.function(state, teacher, one, zeros)
        direction = direction.flatten(0, -2)
        projection.gradient += direction.T @ rows
        del rows, state, zeros  # the peak comes next
        gradient = (direction @ weight).mul_(scale).view(hidden.shape)
        return gradient.add_(grad_hidden).to(hidden.dtype), values

    return AlignmentLoss(loss.names, projected)


class ProjectionTraining:
    """Creates, trains and frees a `LearnedProjection` on the ranks of the aligned stage.

    Its tensors are registered as buffers of the model chunk, so that Megatron's checkpoints save
    them. It is updated within Megatron's optimizer step, and not if Megatron skips its own update.
    It is not a submodule of the chunk, because DDP has already enumerated the submodules.

    Attributes:
        module: the projection; None on other stages, before the set-up and after the last step.
    """

    def __init__(self, run: TrainingRun, is_last_step: Callable[[], bool]) -> None:
        """Store the settings; the projection is built with the model.

        Args:
            is_last_step: returns whether the weight of the next step is 0.
        """
        self._run = run
        self._layer, self._teacher_width = run.config.layer, run.folder.hidden_size
        self._is_last_step = is_last_step
        self._scale: float | None = None
        self._free: Callable[[], None] | None = None
        self.module: LearnedProjection | None = None

    def wrap_setup(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `setup_model_and_optimizer`, to add the projection to what it returns."""

        @functools.wraps(original)
        def setup(*args: Any, **kwargs: Any) -> Any:
            model, optimizer, scheduler = original(*args, **kwargs)
            if optimizer is not None:
                self._set_up(model, optimizer)
            return model, optimizer, scheduler

        return setup

    def open_step(self, weight: float, num_tokens: int) -> None:
        """Begin a global batch, or repeat one that is replayed.

        Args:
            weight: lambda(s).
            num_tokens: tokens of the global batch over all replicas.
        """
        if self.module is not None:
            self.module.gradient.zero_()
            self._scale = weight / num_tokens

    def free(self) -> None:
        """Remove the projection from model and optimizer, if it is there."""
        if self._free is not None:
            self._free()
            self._free = self.module = None

    def _set_up(self, model: list[torch.nn.Module], optimizer: Any) -> None:
        saved = self._saved()
        self._run.report(
            f"LET: layer {self._layer} is projected to the teacher's width by a linear layer, "
            + ("newly initialised" if saved is None else f"loaded from {saved.folder}")
        )
        found = find_layer(model, self._layer)
        if found is None:
            return
        chunk, config = unwrap_chunks(model)[found[0]], get_model_config(model[0])
        device = next(chunk.parameters()).device
        module = LearnedProjection(
            config.hidden_size, self._teacher_width, config.init_method_std, self._run.seed, device
        )
        if saved is not None:
            _load(module, saved)
        state = {f"{PROJECTION}_{name}": tensor for name, tensor in module.state_dict().items()}
        for name, tensor in state.items():
            chunk.register_buffer(name, tensor)
        # Set on the object, where it shadows the method of its class.
        group = _ranks_with_tokens(config.sequence_parallel)
        optimizer.step = functools.partial(self._step, optimizer, group, optimizer.step)
        self.module = module
        self._free = functools.partial(_detach, chunk, list(state), optimizer)

    def _saved(self) -> TorchDist | None:
        """Return the checkpoint that the run resumes from, if it holds a projection."""
        folder = self._run.loaded_checkpoint()
        if folder is None or not (folder / FORMAT).is_file():
            return None
        checkpoint = TorchDist(folder)
        shape = checkpoint.projection_shape()
        if shape is not None and shape[0] != self._teacher_width:
            raise LETError(
                f"The checkpoint {folder} projects to a teacher of width {shape[0]} but"
                f" --let-teacher has {self._teacher_width}; give the teacher that it was trained"
                " with, or start a new run with --finetune.",
                collective=True,
            )
        return None if shape is None else checkpoint

    def _step(
        self,
        optimizer: Any,
        group: torch.distributed.ProcessGroup,
        original: Callable[[], tuple[bool, Any, Any]],
    ) -> tuple[bool, Any, Any]:
        """Run the `step` of Megatron's optimizer, then update the projection."""
        result = original()
        updated, *_ = result
        if updated and self._scale is not None and self.module is not None:
            self.module.update(self._scale, group, _settings(optimizer))
        self._scale = None
        # Before the checkpoint of this step is saved, which must not hold it.
        if self._is_last_step():
            self.free()
        return result


def _detach(chunk: torch.nn.Module, names: list[str], optimizer: Any) -> None:
    for name in names:
        delattr(chunk, name)
    del optimizer.step


def _load(module: LearnedProjection, checkpoint: TorchDist) -> None:
    """Copy weight and moments on each rank; they are small and not sharded."""
    for name, buffer in module.state_dict().items():
        buffer.copy_(checkpoint.read(f"{PROJECTION}_{name}"))


def _ranks_with_tokens(sequence_parallel: bool) -> torch.distributed.ProcessGroup:
    """Return the stage's ranks that hold different tokens of a global batch."""
    if sequence_parallel:
        return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _settings(optimizer: Any) -> dict[str, Any]:
    """Return the hyperparameters of the student's matrices at this step."""
    group = next(
        group
        for group in optimizer.param_groups
        if group.get("default_config") and group.get("wd_mult", 1.0) == 1.0
    )
    config = optimizer.config
    return {
        "lr": group["lr"],
        "weight_decay": group["weight_decay"],
        "beta1": config.adam_beta1,
        "beta2": config.adam_beta2,
        "eps": config.adam_eps,
        "decoupled_weight_decay": config.decoupled_weight_decay,
    }
