"""LET's gradient scale, and the parameter gather that overlaps the teacher."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_let.methods.let import (
    before_finalizing,
    gradient_denominator,
    per_token_gradient_factor,
    start_param_gather,
)
from megatron_let.placement.sequence_shard import SequenceShard

sizes = st.integers(min_value=1, max_value=4)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_gradient_denominator_gives_mean_over_global_batch(
    replicas: int, micro_batch_size: int, num_microbatches: int, cp: int
) -> None:
    """Megatron averages the contributions of the DP x CP ranks."""
    length = 2 * cp * 3
    cosines = torch.rand(replicas, num_microbatches, length, micro_batch_size, dtype=torch.float64)
    denominator = gradient_denominator(micro_batch_size, length, cp, num_microbatches)
    contributions = [
        cosines[replica, :, start:end].sum() / denominator
        for replica in range(replicas)
        for rank in range(cp)
        for start, end in SequenceShard(cp, rank).ranges(length)
    ]
    torch.testing.assert_close(sum(contributions) / (replicas * cp), cosines.mean())


def test_per_token_factor_gives_mean_over_all_tokens() -> None:
    cosines = torch.rand(32, dtype=torch.float64)
    factor = per_token_gradient_factor(unmasked_tokens=20, all_tokens=32)
    torch.testing.assert_close(cosines.sum() * factor / 20, cosines.mean())


class BucketGroup:
    """Like Megatron's `_ParamAndGradBucketGroup`: a gather must not be started twice."""

    def __init__(self, dispatched: bool = False) -> None:
        self.param_gather_dispatched = dispatched
        self.num_started = 0

    def start_param_sync(self) -> None:
        assert not self.param_gather_dispatched
        self.param_gather_dispatched = True
        self.num_started += 1


def chunk(groups: list[BucketGroup], **values: Any) -> Any:
    """Return a chunk with DDP's attributes under `--overlap-param-gather`, after its first step."""
    usual = {
        "remove_forward_pre_hook_handles": {"a module": "its hook"},
        "overlap_param_gather_with_optimizer_step": False,
        "bucket_groups": groups,
    }
    return SimpleNamespace(**usual | values)


def test_start_param_gather_starts_only_the_first_layers() -> None:
    groups = [BucketGroup(), BucketGroup()]
    start_param_gather(chunk(groups))
    # Bucket groups are in backward order.
    assert [group.num_started for group in groups] == [0, 1]


def test_start_param_gather_already_dispatched_does_nothing() -> None:
    groups = [BucketGroup(), BucketGroup(dispatched=True)]
    start_param_gather(chunk(groups))
    assert [group.num_started for group in groups] == [0, 0]


@pytest.mark.parametrize(
    "values",
    [
        {"remove_forward_pre_hook_handles": {}},  # the first step, or runs without the overlap
        {"overlap_param_gather_with_optimizer_step": True},
    ],
)
def test_start_param_gather_without_a_later_wait_does_nothing(values: dict[str, Any]) -> None:
    groups = [BucketGroup()]
    start_param_gather(chunk(groups, **values))
    assert groups[0].num_started == 0


def test_start_param_gather_without_ddp_does_nothing() -> None:
    start_param_gather(SimpleNamespace())
    start_param_gather(chunk([]))


def test_before_finalizing_runs_work_first_and_restores_the_function() -> None:
    events: list[str] = []

    def finalize() -> None:
        events.append("finalize")

    config = SimpleNamespace(finalize_model_grads_func=finalize)
    with before_finalizing(config, lambda: events.append("work")):
        config.finalize_model_grads_func()
    assert events == ["work", "finalize"] and config.finalize_model_grads_func is finalize


def test_before_finalizing_without_a_function_runs_work_last() -> None:
    events: list[str] = []
    config = SimpleNamespace(finalize_model_grads_func=None)
    with before_finalizing(config, lambda: events.append("work")):
        events.append("schedule")
    assert events == ["schedule", "work"]
