"""The teacher's work before the schedule runs beside the gathering of the first parameters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_let.methods.let import start_param_gather


class BucketGroup:
    """As Megatron's `_ParamAndGradBucketGroup`: a gather must not be started twice."""

    def __init__(self, dispatched: bool = False) -> None:
        self.param_gather_dispatched = dispatched
        self.num_started = 0

    def start_param_sync(self) -> None:
        assert not self.param_gather_dispatched
        self.param_gather_dispatched = True
        self.num_started += 1


def chunk(groups: list[BucketGroup], **values: Any) -> Any:
    """DDP's attributes under `--overlap-param-gather`, after its first step."""
    usual = {
        "remove_forward_pre_hook_handles": {"a module": "its hook"},
        "overlap_param_gather_with_optimizer_step": False,
        "bucket_groups": groups,
    }
    return SimpleNamespace(**usual | values)


def test_the_first_layers_gather_is_started_and_only_that() -> None:
    groups = [BucketGroup(), BucketGroup()]
    start_param_gather(chunk(groups))
    # Bucket groups are in the order of the backward.
    assert [group.num_started for group in groups] == [0, 1]


def test_a_gather_under_way_is_left_alone() -> None:
    groups = [BucketGroup(), BucketGroup(dispatched=True)]
    start_param_gather(chunk(groups))
    assert [group.num_started for group in groups] == [0, 0]


@pytest.mark.parametrize(
    "values",
    [
        {"remove_forward_pre_hook_handles": {}},  # the first step, and runs without the overlap
        {"overlap_param_gather_with_optimizer_step": True},
    ],
)
def test_nothing_is_started_that_nobody_waits_for(values: dict[str, Any]) -> None:
    groups = [BucketGroup()]
    start_param_gather(chunk(groups, **values))
    assert groups[0].num_started == 0


def test_a_model_without_ddp_has_nothing_to_gather() -> None:
    start_param_gather(SimpleNamespace())
    start_param_gather(chunk([]))
