"""Data sets that change what another data set returns."""

from __future__ import annotations

import pytest

from megatron_let.data.wrapper import RepeatedDataset


@pytest.mark.parametrize("start", [0, 3, 4, 9])
def test_each_evaluation_begins_with_the_first_sample(start: int) -> None:
    repeated = RepeatedDataset(list(range(10)), period=4, length=100, start=start)
    assert [repeated[start + i] for i in range(9)] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert len(repeated) == 100
