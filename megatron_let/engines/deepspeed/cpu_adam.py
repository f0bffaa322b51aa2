"""DeepSpeed's Adam on the host, brought to where an unbroken run has it."""

from __future__ import annotations

import torch


def replay_steps(optimizer: torch.optim.Optimizer) -> None:
    """Repeat the steps that a loaded optimizer has taken on nothing; other optimizers are left be.

    DeepSpeed's CPU Adam multiplies the powers of beta up step by step, and after a resume begins
    with `pow` (`Adam_Optimizer::IncrementStep`), which rounds otherwise. A step takes microseconds.

    Args:
        optimizer: inside DeepSpeed's engine, its state loaded.
    """
    if not hasattr(optimizer, "ds_opt_adam"):
        return
    taken = max((int(state["step"]) for state in optimizer.state.values()), default=0)
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    parameter, gradient, first, second = (torch.zeros(1) for _ in range(4))
    for step in range(1, taken + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id,  # type: ignore[attr-defined]
            *(step, 0.0, beta1, beta2, 1.0, 0.0, True, parameter, gradient, first, second),
        )
