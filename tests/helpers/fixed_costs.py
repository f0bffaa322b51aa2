"""Run the entry with fixed costs in place of measured ones, so that the plan is always the same.

`-m tests.helpers.fixed_costs ARGS`, with the entry's arguments. A microbatch costs every stage
1 forward and 2 backward, and the teacher 0.5; the first step is the measured one.
"""

from __future__ import annotations

import sys
from typing import Any

from megatron_let import pretrain

TEACHER_COST = 0.5

if __name__ == "__main__":
    pretrain.prepare_process(pretrain.detect_host(), 0)
    # The entry imports Megatron itself, after it has looked at the host.
    from megatron.core.rerun_state_machine import RerunMode

    from megatron_let.placement import scheduler as placer
    from megatron_let.placement.simulate import Costs

    def fixed(self: Any, pipeline: Any, stage: int) -> Costs:
        return Costs.uniform(pipeline.num_stages, 1, 2, TEACHER_COST)

    placer.PassTimes.costs = fixed  # type: ignore[method-assign]
    placer._MEASURED_STEP = 0
    # 0.19.2 offers `--rerun-mode report_stats`, which takes every step twice, but knows the mode
    # under another name only.
    RerunMode._value2member_map_["report_stats"] = RerunMode.REPORT_DETERMINISM_STATS
    sys.exit(pretrain.main())
