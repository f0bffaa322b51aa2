"""Run the entry on DeepSpeed's engine; fail unless each step follows the teacher's work.

`-m tests.helpers.after_backward ARGS`, with the entry's arguments: LET for 8 of 10 steps.
"""

from __future__ import annotations

import sys
from typing import Any

from megatron_let import pretrain


def _record(events: list[str], cls: Any, name: str, event: str) -> None:
    original = getattr(cls, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        events.append(event)
        return original(*args, **kwargs)

    setattr(cls, name, recorded)


if __name__ == "__main__":
    host = pretrain.detect_host()
    pretrain.prepare_process(host, 0)
    # The entry imports Megatron only after it has detected the host.
    from megatron_let.engines.deepspeed.optimizer import DeepSpeedOptimizer
    from megatron_let.placement.state_buffer import TeacherStateBuffer

    found: list[str] = []
    _record(found, TeacherStateBuffer, "after_backward", "teacher")
    _record(found, DeepSpeedOptimizer, "step", "step")
    assert pretrain.main() == 0
    assert found == ["teacher", "step"] * 8 + ["step"] * 2, found
    sys.exit(0)
