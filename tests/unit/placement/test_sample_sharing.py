"""Samples of a microbatch shared over the tensor- or context-parallel ranks of a stage."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from megatron.core import parallel_state
from torch import Tensor

from megatron_let.placement.sample_sharing import SampleSharing, local_shard, stage_ranks
from megatron_let.placement.sequence_shard import SequenceShard
from tests.helpers.runs import call_ranks, free_port

pytestmark = pytest.mark.medium

TOKENS = torch.arange(4 * 8).view(4, 8)
NUM_RANKS = 2


class CountingTeacher:
    """The state is a function of the token; counts its samples."""

    width = 5

    def __init__(self) -> None:
        self.num_samples = 0

    def hidden_state(self, tokens: Tensor) -> Tensor:
        self.num_samples += len(tokens)
        return torch.where(tokens == 31, torch.inf, tokens.float())[..., None] + torch.arange(5)


def expected(tokens: Tensor, shard: SequenceShard) -> Tensor:
    teacher: Any = CountingTeacher()
    state, _ = SampleSharing(teacher, shard, None).state(tokens)
    return state


def share(tokens: Tensor, sequence_parallel: bool) -> dict[str, Any]:
    """Run this rank's part; what it returned, what it should have, and the samples it ran."""
    teacher: Any = CountingTeacher()
    shard = local_shard(sequence_parallel)
    state, failed = SampleSharing(teacher, shard, stage_ranks()).state(tokens)
    return {
        "state": state,
        "failed": float(failed),
        "expected": expected(tokens, shard),
        "num_samples": teacher.num_samples,
    }


def _rank(rank: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=NUM_RANKS)
    results = {}
    for name, sizes in {"tp": (2, 1), "cp": (1, 2)}.items():
        parallel_state.initialize_model_parallel(sizes[0], context_parallel_size=sizes[1])
        results[name] = share(TOKENS[:2], sequence_parallel=False)
        results[name + " sp"] = share(TOKENS[:2], sequence_parallel=True)
        results[name + " odd"] = share(TOKENS[:3], sequence_parallel=False)
        results[name + " inf"] = share(TOKENS[2:], sequence_parallel=False)
        parallel_state.destroy_model_parallel()
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """Return the results of two ranks, by layout."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(_rank, (free_port(), folder), nprocs=NUM_RANKS, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("name", ["tp", "tp sp", "cp", "cp sp"])
def test_state_two_ranks_run_half_of_the_samples_each(results: Any, name: str) -> None:
    for rank in results:
        assert rank[name]["num_samples"] == 1
        assert torch.equal(rank[name]["state"], rank[name]["expected"])
        assert rank[name]["failed"] == 0


@pytest.mark.parametrize("name", ["tp odd", "cp odd"])
def test_state_indivisible_microbatch_runs_on_every_rank(results: Any, name: str) -> None:
    for rank in results:
        assert rank[name]["num_samples"] == 3
        assert torch.equal(rank[name]["state"], rank[name]["expected"])


@pytest.mark.parametrize("name", ["tp inf", "cp inf"])
def test_state_non_finite_sample_is_zero_and_flagged_by_its_rank(results: Any, name: str) -> None:
    assert [rank[name]["failed"] for rank in results] == [0, 1]
    for rank in results:
        finite, failed = rank[name]["state"].unbind(1)
        assert finite.isfinite().all() and finite.count_nonzero() > 0
        assert not failed.any()


def share_several_microbatches() -> None:
    """Four ranks run as many microbatches at a time as they have samples for, or fewer."""
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(2, context_parallel_size=2)
    group = stage_ranks()
    for micro_batch_size, most in ((1, 4), (2, 2), (3, 4), (4, 1)):
        tokens = torch.arange(32, 32 + 4 * micro_batch_size * 8).view(4, micro_batch_size, 8)
        for sequence_parallel, number in itertools.product((False, True), range(1, most + 1)):
            teacher: Any = CountingTeacher()
            shard = local_shard(sequence_parallel)
            sharing = SampleSharing(teacher, shard, group)
            assert sharing.num_together(micro_batch_size) == most
            states, failed = sharing.states(tokens[:number])
            assert teacher.num_samples == micro_batch_size * most // 4
            assert not failed.any() and len(states) == number
            for state, one in zip(states, tokens, strict=False):
                assert torch.equal(state, expected(one, shard))
                assert state.is_contiguous()


def find_the_microbatch_that_is_not_finite() -> None:
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(4)
    teacher: Any = CountingTeacher()
    sharing = SampleSharing(teacher, local_shard(True), stage_ranks())
    # The second of three microbatches has token 31; the fourth rank repeats the third.
    states, failed = sharing.states(torch.tensor([8, 24, 16]).view(3, 1, 1) + torch.arange(8))
    torch.distributed.all_reduce(failed)
    assert failed.tolist() == [0, 1, 0]
    assert [state.count_nonzero() > 0 for state in states] == [True, False, True]


def test_ranks_without_a_sample_run_other_microbatches() -> None:
    call_ranks(share_several_microbatches, ranks=4)


def test_non_finite_microbatch_is_named_among_those_run_together() -> None:
    call_ranks(find_the_microbatch_that_is_not_finite, ranks=4)
