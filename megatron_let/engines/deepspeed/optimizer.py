"""DeepSpeed's engine as the optimizer of Megatron's training loop."""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.utils import clip_grad_norm_

from megatron_let.engines.deepspeed.model import DeepSpeedModel
from megatron_let.engines.deepspeed.step_check import StepCheck


class DeepSpeedOptimizer:
    """The interface that `train_step` and the learning rate schedule use.

    Attributes:
        is_stub_optimizer: False; every rank has parameters.
    """

    is_stub_optimizer = False

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self._engine = engine
        self._check = StepCheck(engine.module)
        self._one = torch.ones(())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return DeepSpeed's parameter groups, with Megatron's `wd_mult` and similar keys."""
        return self._engine.optimizer.param_groups

    def zero_grad(self) -> None:
        """Do nothing: DeepSpeed clears the gradients after each step."""

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss itself: without fp16 there is no loss scale."""
        return loss

    def get_loss_scale(self) -> torch.Tensor:
        """Return 1: without fp16 there is no loss scale."""
        return self._one

    def reload_model_params(self) -> None:
        """Do nothing: DeepSpeed's master weights are created with the engine."""

    def step(self) -> tuple[bool, float, None]:
        """Take the step of the last microbatch.

        Returns:
            Whether it was taken, the norm of the whole gradient before clipping, and None for the
            number of zeros.
        """
        norm = self._norm_without_zero()
        self._check.before_step(max(group["lr"] for group in self.param_groups))
        self._engine.step()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        self._check.after_step(norm)
        return math.isfinite(norm), norm, None

    def _norm_without_zero(self) -> float | None:
        """Return the gradient norm under ZeRO-0 in fp32, where DeepSpeed clips but keeps none."""
        if not isinstance(self._engine.optimizer, torch.optim.Optimizer):
            return None
        parameters = self._engine.module.parameters()
        return float(clip_grad_norm_(parameters, math.inf, mpu=self._engine.mpu))


def optimizer_of(
    config: Any, model_chunks: list[DeepSpeedModel], **unused: Any
) -> DeepSpeedOptimizer:
    """Replace `get_megatron_optimizer`: the engine already has the optimizer."""
    (chunk,) = model_chunks
    return DeepSpeedOptimizer(chunk.engine)
