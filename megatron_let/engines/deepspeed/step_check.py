"""Check that every step trains: a finite gradient norm, and weights that change."""

from __future__ import annotations

import math

import torch

from megatron_let.errors import LETError


def checksums(module: torch.nn.Module) -> list[int]:
    """Return one integer per parameter's local part; any changed bit changes it."""
    parts = [getattr(parameter, "ds_tensor", parameter) for parameter in module.parameters()]
    # A part on NVMe has no elements in memory.
    return [int(_bits(part.detach()).sum(dtype=torch.int64)) for part in parts if part.numel()]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


class StepCheck:
    """Checks every gradient norm, and that the first step with a learning rate changes a weight."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._before: list[int] | None = None
        self._changed = False

    def before_step(self, learning_rate: float) -> None:
        """Call before the optimizer's step; a warm-up starts with a learning rate of 0."""
        is_checked = not self._changed and learning_rate > 0
        self._before = checksums(self._module) if is_checked else None

    def after_step(self, norm: float) -> None:
        """Call after the optimizer's step.

        Args:
            norm: norm of the whole gradient, before clipping.

        Raises:
            LETError: the norm is not finite or is 0, or no weight changed.
        """
        if not math.isfinite(norm):
            raise LETError(
                f"DeepSpeed's gradient norm is {norm}, and the step was applied; resume from the"
                " last checkpoint with a lower --lr or other data.",
                collective=True,
            )
        if self._changed:
            return
        if norm == 0:
            raise LETError(
                "DeepSpeed's gradient norm is 0: no gradient reaches its optimizer, so nothing"
                " would be trained.",
                collective=True,
            )
        if self._before is not None:
            self._changed, before = True, self._before
            if before and before == checksums(self._module):
                raise LETError(
                    f"No weight changed in DeepSpeed's first step although the gradient norm is"
                    f" {norm:.3g}; nothing would be trained.",
                    collective=True,
                )
