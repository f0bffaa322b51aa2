"""Weights of the teacher's loss as functions of the step."""

from __future__ import annotations

from megatron_let.config.let_config import LETConfig


def alignment_weight(step: int, initial_weight: float, stop_step: int) -> float:
    """Return lambda(s) = lambda_0 * max(0, (S_stop - s) / S_stop), equation 5 of the paper.

    Args:
        step: s, 0-based training step (Megatron's `curr_iteration`).
        initial_weight: lambda_0.
        stop_step: S_stop, at least 1.
    """
    return initial_weight * max(0, stop_step - step) / stop_step


def distillation_weight(step: int, config: LETConfig) -> float:
    """Return w(s) of `rkd` (constant) or `salt` (constant or linear decay, 0 from `stop_step` on).

    Args:
        step: 0-based training step.
        config: with method `rkd` or `salt`.
    """
    if config.method == "rkd":
        return config.kd_weight
    if step >= config.stop_step:
        return 0.0
    fade = (config.stop_step - step) / config.stop_step if config.kd_fade else 1.0
    return config.kd_weight * fade
