"""The forward hook on the student's layer k, where the alignment enters as a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import make_viewless_tensor

from megatron_let.alignment.losses import AlignmentLoss


def _in_backward() -> bool:
    # Activation recompute runs the layer, and so the hook, inside the backward pass.
    return torch._C._current_graph_task_id() != -1


@dataclass
class _OpenStep:
    """State of one global batch."""

    teacher_state: Callable[[int], torch.Tensor]
    gradient_scale: torch.Tensor
    sums: torch.Tensor
    num_tokens: int = 0
    num_forward: int = 0
    num_recomputed: int = 0


class AlignmentHook:
    """Aligns the hidden state of one transformer layer in each microbatch of an open step.

    Outside an open step (evaluation, weight 0) the layer's output passes unchanged.
    """

    def __init__(self, layer: torch.nn.Module, loss: AlignmentLoss) -> None:
        self._loss = loss
        self._step: _OpenStep | None = None
        self._handle = layer.register_forward_hook(self._on_output)

    def open_step(
        self,
        teacher_state: Callable[[int], torch.Tensor],
        gradient_scale: float | torch.Tensor,
        device: torch.device,
    ) -> None:
        """Begin a global batch.

        Args:
            teacher_state: from the microbatch's index to the teacher's [s_local, b, d_T].
            gradient_scale: factor of d(sum of local losses)/dh; a 0-dim tensor stays on its
                device (the loss scale of fp16).
            device: of the hidden states.
        """
        if not isinstance(gradient_scale, torch.Tensor):
            gradient_scale = torch.tensor(gradient_scale, dtype=torch.float64)
        sums = torch.zeros(len(self._loss.names), dtype=torch.float32, device=device)
        self._step = _OpenStep(teacher_state, gradient_scale, sums)

    def close_step(self) -> tuple[torch.Tensor, int]:
        """End the global batch.

        Returns:
            Sums over local tokens, one for each of the loss's names, and the number of tokens.
        """
        assert self._step is not None, "close_step without open_step"
        step, self._step = self._step, None
        return step.sums, step.num_tokens

    def remove(self) -> None:
        """Take the hook off the layer."""
        self._handle.remove()
        self._step = None

    def _next_microbatch(self, step: _OpenStep) -> int:
        # Forwards and backwards of one model chunk each run in microbatch order, but not together.
        if _in_backward():
            step.num_recomputed += 1
            return step.num_recomputed - 1
        step.num_forward += 1
        return step.num_forward - 1

    def _on_output(self, layer: torch.nn.Module, inputs: Any, output: Any) -> Any:
        step = self._step
        if step is None:
            return None
        microbatch = self._next_microbatch(step)
        if not torch.is_grad_enabled():
            # First pass of a recomputed layer: the second one, in the backward, is the one that
            # counts.
            return None
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        hidden, values = self._loss.align(
            hidden, step.teacher_state(microbatch), step.gradient_scale
        )
        step.sums += torch.stack([value.sum() for value in values])
        step.num_tokens += values[0].numel()
        # The pipeline frees a stage's output and asserts that it is no view.
        hidden = make_viewless_tensor(hidden, requires_grad=True, keep_graph=True)
        return (hidden, *rest) if isinstance(output, tuple) else hidden
