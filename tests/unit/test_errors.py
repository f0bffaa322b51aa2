"""Which ranks print an error."""

from __future__ import annotations

import pytest
import torch

from megatron_let.errors import LETError, print_error


@pytest.mark.parametrize(
    ("initialized", "collective", "rank", "local_rank", "prints"),
    [
        (False, False, 0, 0, True),
        (False, False, 1, 1, False),
        (False, False, 8, 0, True),  # rank 0 of the second node
        (True, False, 1, 1, True),
        (True, True, 1, 1, False),
        (True, True, 8, 0, False),
        (True, True, 0, 0, True),
    ],
)
def test_error_is_printed_once_per_node_at_start_and_once_per_job_if_collective(
    initialized: bool,
    collective: bool,
    rank: int,
    local_rank: int,
    prints: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: initialized)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    print_error(LETError("No.", collective))
    assert capsys.readouterr().err == (f"megatron_let: error (rank {rank}): No.\n" * prints)
