"""A run that trains nothing is an error after its first step, not after a week."""

from __future__ import annotations

import math

import torch

from megatron_let.errors import LETError


def checksums(module: torch.nn.Module) -> list[int]:
    """One integer for each parameter's local part, which changes with any bit of it."""
    parts = [getattr(parameter, "ds_tensor", parameter) for parameter in module.parameters()]
    # A part on NVMe has no elements here.
    return [int(_bits(part.detach()).sum(dtype=torch.int64)) for part in parts if part.numel()]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


class FirstStepGuard:
    """Checks the gradient norm of every step, and that the first one with a rate moved a weight.

    Args:
        module: the model in DeepSpeed's engine.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._before: list[int] | None = None
        self._moved = False

    def before_step(self, learning_rate: float) -> None:
        """Call it before the optimizer's step; a warm-up begins with a learning rate of 0."""
        watch = not self._moved and learning_rate > 0
        self._before = checksums(self._module) if watch else None

    def after_step(self, norm: float) -> None:
        """Call it after the optimizer's step.

        Args:
            norm: of the whole gradient, before clipping.

        Raises:
            LETError: the norm is no number or 0, or no weight moved.
        """
        if not math.isfinite(norm):
            raise LETError(
                f"DeepSpeed's gradient norm is {norm} and its step was taken; resume from the last"
                " checkpoint, with a lower --lr or other data.",
                collective=True,
            )
        if self._moved:
            return
        if norm == 0:
            raise LETError(
                "DeepSpeed's gradient norm is 0: no gradient reaches its optimizer, so nothing"
                " would be trained.",
                collective=True,
            )
        if self._before is not None:
            self._moved, before = True, self._before
            if before and before == checksums(self._module):
                raise LETError(
                    f"No weight moved in DeepSpeed's first step although its gradient norm is"
                    f" {norm:.3g}; nothing would be trained.",
                    collective=True,
                )
