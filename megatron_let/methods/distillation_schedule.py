"""The weight of the teacher's distribution as a function of the step."""

from __future__ import annotations

from megatron_let.config.let_config import LETConfig


def distillation_weight(step: int, config: LETConfig) -> float:
    """w(s): constant for `rkd`; for `salt`, constant and 0 from `stop_step` on.

    Args:
        step: 0-based training step.
        config: of a run whose method is `rkd` or `salt`.
    """
    over = config.method == "salt" and step >= config.stop_step
    return 0.0 if over else config.kd_weight
