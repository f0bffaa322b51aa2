"""Interval of checkpoints and share of useful time under random interruptions."""

from __future__ import annotations

import math


def interruption_seconds(per_gpu_hour: float, gpus: int) -> float:
    """Return the mean time between interruptions of a job, which any of its GPUs interrupts.

    Args:
        per_gpu_hour: interruptions per GPU and hour.
    """
    return 3600 / (per_gpu_hour * gpus)


def checkpoint_interval(save_seconds: float, between: float) -> float:
    """Return the seconds of work between two checkpoints that lose the least time.

    Source: Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps"
    (2006), equation 37; its first term is Young's sqrt(2 * save * between).

    Args:
        save_seconds: time for which a checkpoint stops training.
        between: mean time between interruptions.
    """
    if save_seconds >= 2 * between:
        return between
    ratio = save_seconds / (2 * between)
    return math.sqrt(2 * save_seconds * between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - (
        save_seconds
    )


def useful_share(
    interval: float, save_seconds: float, restart_seconds: float, between: float
) -> float:
    """Return the share of time that trains, with interruptions as a Poisson process.

    Source: Daly (2006), equation 20: the time of one interval with its checkpoint, its repetitions
    and its restarts.

    Args:
        interval: seconds of work between two checkpoints.
        save_seconds: time for which a checkpoint stops training.
        restart_seconds: from an interruption to the first step after it.
        between: mean time between interruptions.
    """
    elapsed = between * math.exp(restart_seconds / between)
    elapsed *= math.expm1((interval + save_seconds) / between)
    return interval / elapsed
