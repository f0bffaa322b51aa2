"""Looking ahead in the data changes nothing of what is read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from megatron.core import rerun_state_machine
from megatron.core.rerun_state_machine import RerunDataIterator, RerunMode

from megatron_let.methods.global_batch import LookAhead, peek, read_ahead


def microbatch(number: int) -> dict[str, torch.Tensor]:
    return {"tokens": torch.full((2, 3), number)}


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> RerunDataIterator:
    """Ten microbatches behind Megatron's iterator, whose replay is on."""

    class Machine:
        def get_mode(self) -> RerunMode:
            return RerunMode.VALIDATE_RESULTS

    monkeypatch.setattr(rerun_state_machine, "get_rerun_state_machine", Machine)
    return RerunDataIterator(map(microbatch, range(10)))


def numbers(items: Iterator[dict[str, torch.Tensor]] | None) -> list[int]:
    assert items is not None
    return [int(item["tokens"][0, 0]) for item in items]


def ahead(iterator: object, count: int) -> list[int] | None:
    tokens = peek(iterator, count, "tokens")  # type: ignore[arg-type]
    return None if tokens is None else tokens[:, 0, 0].tolist()


def test_what_was_seen_is_still_to_be_read(data: RerunDataIterator) -> None:
    assert numbers(read_ahead(data, 3)[0]) == [0, 1, 2]  # type: ignore[arg-type]
    assert ahead(data, 2) == [3, 4]
    assert ahead(data, 4) == [3, 4, 5, 6]
    assert numbers(read_ahead(data, 5)[0]) == [3, 4, 5, 6, 7]  # type: ignore[arg-type]
    assert ahead(data, 2) == [8, 9]


def test_a_replayed_step_reads_its_own_microbatches(data: RerunDataIterator) -> None:
    data.advance()
    read_ahead(data, 2)
    assert ahead(data, 2) == [2, 3]
    data.rewind()
    assert numbers(read_ahead(data, 2)[0]) == [0, 1]  # type: ignore[arg-type]
    assert ahead(data, 2) == [2, 3]
    assert len(data.state_dict()["saved_microbatches"]) == 2
    data.advance()
    assert numbers(read_ahead(data, 2)[0]) == [2, 3]  # type: ignore[arg-type]


def test_the_end_of_the_data_is_no_error_until_it_is_read(data: RerunDataIterator) -> None:
    read_ahead(data, 8)
    assert ahead(data, 3) is None
    assert numbers(read_ahead(data, 2)[0]) == [8, 9]  # type: ignore[arg-type]
    with pytest.raises(StopIteration):
        next(data)


def test_nothing_is_seen_where_nothing_is_read_or_a_place_is_saved(data: RerunDataIterator) -> None:
    assert peek(None, 2, "tokens") is None and peek([None, None], 2, "tokens") is None
    assert peek(data, 0, "tokens") is None
    assert ahead([None, data], 1) == [0]

    class Saving(LookAhead):
        def save_state(self) -> None: ...

    assert peek(RerunDataIterator(Saving(iter([]))), 1, "tokens") is None
