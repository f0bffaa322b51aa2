"""DeepSpeed's engine as the optimizer of Megatron's training loop."""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.utils import clip_grad_norm_

from megatron_let.engines.deepspeed.guard import FirstStepGuard
from megatron_let.engines.deepspeed.model import DeepSpeedModel


class DeepSpeedOptimizer:
    """What `train_step` and the learning rate's schedule ask of Megatron's optimizer.

    Attributes:
        is_stub_optimizer: False; every rank has parameters.
    """

    is_stub_optimizer = False

    def __init__(self, engine: deepspeed.DeepSpeedEngine, guard: FirstStepGuard) -> None:
        self._engine = engine
        self._guard = guard
        self._one = torch.ones(())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of the optimizer in DeepSpeed, with Megatron's `wd_mult`, `max_lr` and so on."""
        return self._engine.optimizer.param_groups

    def zero_grad(self) -> None:
        """DeepSpeed clears gradients after each step by itself."""

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss itself: there is no loss scale without fp16."""
        return loss

    def get_loss_scale(self) -> torch.Tensor:
        """1: there is no loss scale without fp16."""
        return self._one

    def reload_model_params(self) -> None:
        """Nothing to do: DeepSpeed's masters are made with the engine."""

    def step(self) -> tuple[bool, float, None]:
        """Take the step of the last microbatch.

        Returns:
            Whether it was taken, the norm of the whole gradient before clipping, and no count of
            zeros.
        """
        norm = self._norm_without_zero()
        self._guard.before_step(max(group["lr"] for group in self.param_groups))
        self._engine.step()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        self._guard.after_step(norm)
        return math.isfinite(norm), norm, None

    def _norm_without_zero(self) -> float | None:
        """Of all gradients under ZeRO-0 in fp32, where DeepSpeed clips but keeps no norm."""
        if not isinstance(self._engine.optimizer, torch.optim.Optimizer):
            return None
        parameters = self._engine.module.parameters()
        return float(clip_grad_norm_(parameters, math.inf, mpu=self._engine.mpu))


def optimizer_of(
    config: Any, model_chunks: list[DeepSpeedModel], **unused: Any
) -> DeepSpeedOptimizer:
    """Stand in for `get_megatron_optimizer`: the optimizer is in the engine already."""
    (chunk,) = model_chunks
    return DeepSpeedOptimizer(chunk.engine, FirstStepGuard(chunk.engine.module))
