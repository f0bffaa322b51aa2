"""The weight of the alignment loss as a function of the step."""

from __future__ import annotations


def alignment_weight(step: int, initial_weight: float, stop_step: int) -> float:
    """lambda(s) = lambda_0 * max(0, (S_stop - s) / S_stop), equation 5 of the paper.

    Args:
        step: s, 0-based training step (Megatron's `curr_iteration`).
        initial_weight: lambda_0.
        stop_step: S_stop, at least 1.
    """
    return initial_weight * max(0, stop_step - step) / stop_step
