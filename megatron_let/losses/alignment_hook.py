"""The hook on the student's layer k, where the alignment loss enters the backward as a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_let.errors import LETError
from megatron_let.losses import AlignmentLoss, LossFunction


class TeacherStates(Protocol):
    """Source of the teacher's states."""

    def before_forward(self, microbatch: int) -> None:
        """Called when a microbatch enters its forward pass."""

    def state(self, microbatch: int) -> Tensor:
        """Return the teacher's `[s_local, b, d_T]`; called once per microbatch, in its backward."""


class _AlignInBackward(torch.autograd.Function):
    """Identity whose backward adds the loss's gradient to the incoming one.

    The loss thus needs no tensor in the pipeline schedule, and the teacher's state is not needed
    before the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        scale: Tensor,
        loss: LossFunction,
        teacher_state: Callable[[], Tensor],
        report: Callable[[list[Tensor]], None],
    ) -> Tensor:
        ctx.save_for_backward(hidden, scale)
        ctx.loss, ctx.teacher_state, ctx.report = loss, teacher_state, report
        # detach, not view_as: Megatron's pipeline frees a stage's output only if it is not a view.
        return hidden.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor, None, None, None, None]:
        hidden, scale = ctx.saved_tensors
        gradient, values = ctx.loss(hidden, ctx.teacher_state(), scale, grad_hidden)
        ctx.report(values)
        return gradient, None, None, None, None


@dataclass
class _OpenStep:
    """State of one global batch."""

    teacher: TeacherStates
    scale: Tensor
    sums: Tensor
    num_tokens: int = 0
    num_forward: int = 0
    num_recomputed: int = 0

    def count(self, values: list[Tensor]) -> None:
        """Add the loss's values of a microbatch, `[s_local, b]` each."""
        self.sums += torch.stack([value.sum() for value in values])
        self.num_tokens += values[0].numel()


class AlignmentHook:
    """Aligns the hidden state of one transformer layer in each microbatch of an open step.

    Outside an open step (evaluation, weight 0) the layer's output passes unchanged.
    """

    def __init__(self, layer: torch.nn.Module, loss: AlignmentLoss) -> None:
        self._loss = loss
        self._step: _OpenStep | None = None
        # torch.compile must not trace what depends on the open step and on being in a backward.
        hook = torch.compiler.disable(self._on_output)
        self._handle = layer.register_forward_hook(hook)

    def open_step(
        self, teacher: TeacherStates, gradient_scale: float | Tensor, device: torch.device
    ) -> None:
        """Begin a global batch.

        Args:
            gradient_scale: factor of d(sum of local losses)/dh; a 0-dim tensor (the loss scale
                of fp16) is on `device`.
        """
        if not isinstance(gradient_scale, Tensor):
            # Filled on the device: a copy from the host could wait for it.
            gradient_scale = torch.full((), gradient_scale, dtype=torch.float64, device=device)
        sums = torch.zeros(len(self._loss.names), dtype=torch.float32, device=device)
        self._step = _OpenStep(teacher, gradient_scale, sums)

    def close_step(self) -> tuple[Tensor, int]:
        """End the global batch.

        Returns:
            Sums over local tokens, one for each of the loss's names, and the number of tokens.
        """
        assert self._step is not None, "close_step without open_step"
        step, self._step = self._step, None
        return step.sums, step.num_tokens

    def remove(self) -> None:
        """Remove the hook from the layer."""
        self._handle.remove()
        self._step = None

    def _next_microbatch(self, step: _OpenStep) -> int:
        # Forwards and backwards of a model chunk each run in microbatch order, but interleaved.
        if _in_backward():
            step.num_recomputed += 1
            return step.num_recomputed - 1
        step.num_forward += 1
        step.teacher.before_forward(step.num_forward - 1)
        return step.num_forward - 1

    def _on_output(self, layer: torch.nn.Module, inputs: Any, output: Any) -> Any:
        step = self._step
        if step is None:
            return None
        microbatch = self._next_microbatch(step)
        if not torch.is_grad_enabled():
            # First pass of a recomputed layer; the second pass, in the backward, is aligned.
            return None
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        if not isinstance(hidden, Tensor):
            raise LETError(
                f"The student's layer {type(layer).__name__} returned {type(hidden).__name__}"
                " instead of a hidden state or a tuple that begins with one; give another layer."
            )
        if hasattr(hidden, "device_mesh"):
            # A DTensor; its type is not imported, as a build of torch may lack torch.distributed.
            raise LETError(
                f"The student's layer {type(layer).__name__} returned a DTensor; give a layer whose"
                " output is local, such as by `PrepareModuleOutput(..., use_local_output=True)`."
            )
        state = partial(step.teacher.state, microbatch)
        hidden = _AlignInBackward.apply(hidden, step.scale, self._loss.function, state, step.count)
        return (hidden, *rest) if isinstance(output, tuple) else hidden


def _in_backward() -> bool:
    # Activation recompute runs the layer, and so the hook, inside the backward pass.
    return torch._C._current_graph_task_id() != -1
