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
    """Return w(s): constant for `rkd`; constant for `salt` until `stop_step`, then 0.

    Args:
        step: 0-based training step.
        config: settings with method `rkd` or `salt`.
    """
    over = config.method == "salt" and step >= config.stop_step
    return 0.0 if over else config.kd_weight
