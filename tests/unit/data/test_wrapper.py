"""Data sets that change what another data set returns."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_let.data.gpt import same_samples
from megatron_let.data.wrapper import RepeatedDataset


@pytest.mark.parametrize("start", [0, 3, 4, 9])
def test_each_evaluation_begins_with_the_first_sample(start: int) -> None:
    repeated = RepeatedDataset(list(range(10)), period=4, length=100, start=start)
    assert [repeated[start + i] for i in range(9)] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert len(repeated) == 100


@pytest.mark.parametrize(("skip_train", "first"), [(False, 5), (True, 0)])
def test_resumed_run_evaluates_from_the_first_sample(skip_train: bool, first: int) -> None:
    args = Namespace(
        full_validation=False, dataloader_type="single", skip_train=skip_train, eval_iters=2,
        eval_global_batch_size=2, consumed_valid_samples=5,
    )  # fmt: skip
    repeated = same_samples(args, range(10))
    assert [repeated[first + i] for i in range(5)] == [0, 1, 2, 3, 0]
