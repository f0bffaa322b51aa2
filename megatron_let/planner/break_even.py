"""GPU hours to the baseline's loss, and the speed-up below which LET does not pay."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_let.planner.estimate import Estimate
from megatron_let.planner.teacher_group import teacher_group


@dataclass(frozen=True)
class RunCost:
    """Cost of a whole run.

    Attributes:
        gpu_hours: the baseline's.
        tokens: the baseline's.
        teacher_share: steps with the teacher over all steps of the baseline.
        ratios: GPU time per step relative to a step without a teacher, by placement.
    """

    gpu_hours: float
    tokens: float
    teacher_share: float
    ratios: dict[str, float]

    def let_gpu_hours(self, speedup: float, ratio: float) -> float:
        """Return the GPU hours of LET to the loss that the baseline ends with.

        The number of steps with the teacher does not depend on the speed-up.

        Args:
            speedup: tokens of the baseline over tokens of LET, at equal loss, as the paper's.
            ratio: one of `ratios`.
        """
        steps = 1 / speedup
        return self.gpu_hours * (steps + min(self.teacher_share, steps) * (ratio - 1))

    def break_even(self, ratio: float) -> float:
        """Return the speed-up at which LET takes the baseline's GPU hours."""
        left = 1 - self.teacher_share * (ratio - 1)
        # With fewer steps left, every one of them runs the teacher.
        return 1 / left if left >= self.teacher_share else ratio


def run_cost(found: Estimate, train_iters: int, stop_step: int) -> RunCost:
    """Return the cost of the run that an estimate with a teacher describes.

    Args:
        train_iters: steps of the baseline.
        stop_step: S_stop.

    Raises:
        LETError: the run has no teacher.
    """
    layout, baseline = found.layout, found.baseline_seconds
    gpus = layout.tp * layout.pp * layout.cp * layout.dp
    samples = layout.dp * layout.num_microbatches * layout.micro_batch_size
    group = teacher_group(found.request, layout, baseline)
    ratios: dict[str, float] = {name: s / baseline for name, s in found.seconds.items()}
    ratios[f"group of {group.num_ranks} ranks"] = group.cost_ratio
    return RunCost(
        gpu_hours=train_iters * baseline * gpus / 3600,
        tokens=train_iters * samples * found.request.seq_length,
        teacher_share=min(stop_step, train_iters) / train_iters,
        ratios=ratios,
    )
