"""Reading ahead does not change what a step reads, replays or saves."""

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
    """Ten microbatches behind Megatron's iterator, with replay enabled."""

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


def test_peek_consumes_nothing(data: RerunDataIterator) -> None:
    assert numbers(read_ahead(data, 3)[0]) == [0, 1, 2]  # type: ignore[arg-type]
    assert ahead(data, 2) == [3, 4]
    assert ahead(data, 4) == [3, 4, 5, 6]
    assert numbers(read_ahead(data, 5)[0]) == [3, 4, 5, 6, 7]  # type: ignore[arg-type]
    assert ahead(data, 2) == [8, 9]


def test_replayed_step_reads_its_microbatches_again(data: RerunDataIterator) -> None:
    data.advance()
    read_ahead(data, 2)
    assert ahead(data, 2) == [2, 3]
    data.rewind()
    assert numbers(read_ahead(data, 2)[0]) == [0, 1]  # type: ignore[arg-type]
    assert ahead(data, 2) == [2, 3]
    assert len(data.state_dict()["saved_microbatches"]) == 2
    data.advance()
    assert numbers(read_ahead(data, 2)[0]) == [2, 3]  # type: ignore[arg-type]


def test_peek_past_end_of_data_returns_none(data: RerunDataIterator) -> None:
    read_ahead(data, 8)
    assert ahead(data, 3) is None
    assert numbers(read_ahead(data, 2)[0]) == [8, 9]  # type: ignore[arg-type]
    with pytest.raises(StopIteration):
        next(data)


def test_peek_without_data_or_on_saving_iterator_returns_none(data: RerunDataIterator) -> None:
    assert peek(None, 2, "tokens") is None and peek([None, None], 2, "tokens") is None
    assert peek(data, 0, "tokens") is None
    assert ahead([None, data], 1) == [0]

    class Saving(LookAhead):
        def save_state(self) -> None: ...

    assert peek(RerunDataIterator(Saving(iter([]))), 1, "tokens") is None
