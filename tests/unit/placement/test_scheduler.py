"""Costs that the scheduler measures."""

from __future__ import annotations

import pytest
import torch

from megatron_let.placement import scheduler
from megatron_let.placement.scheduler import PassTimes


@pytest.mark.parametrize(("num_together", "expected"), [(1, 2.0), (2, 3.0), (8, 6.0)])
def test_teacher_time_is_that_of_one_run(
    num_together: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler.time, "perf_counter", iter([10.0, 16.0]).__next__)
    times = PassTimes(torch.device("cpu"), num_together)
    times.time_teacher(lambda: None, num_microbatches=3)
    assert times.teacher == expected
