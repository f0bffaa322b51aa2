"""Run the entry with fixed costs instead of measured ones, so that the plan is reproducible.

`-m tests.helpers.fixed_costs ARGS`, with the entry's arguments. A microbatch costs 1 forward
and 2 backward on every stage, and 0.5 for the teacher; the first step is the measured one.
"""

from __future__ import annotations

import sys
from typing import Any

from megatron_let import pretrain

TEACHER_COST = 0.5


def fix_costs() -> None:
    """Replace what the scheduler measures, in its first step already."""
    # The entry imports Megatron only after it has detected the host.
    from megatron.core.rerun_state_machine import RerunMode

    from megatron_let.placement import scheduler
    from megatron_let.placement.simulate import Costs

    def fixed(self: Any, pipeline: Any, stage: int) -> Costs:
        return Costs.uniform(pipeline.num_stages, 1, 2, TEACHER_COST)

    scheduler.PassTimes.costs = fixed  # type: ignore[method-assign]
    scheduler._MEASURED_STEP = 0
    # 0.19.2 offers `--rerun-mode report_stats`, which runs every step twice, but defines the mode
    # only under another name.
    RerunMode._value2member_map_["report_stats"] = RerunMode.REPORT_DETERMINISM_STATS


if __name__ == "__main__":
    pretrain.prepare_process(pretrain.detect_host(), 0)
    fix_costs()
    sys.exit(pretrain.main())
