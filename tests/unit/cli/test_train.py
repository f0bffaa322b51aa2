"""`megatron-let train`: torchrun's environment is kept, and a single process needs none."""

from __future__ import annotations

import os

import pytest

from megatron_let import pretrain
from megatron_let.cli.__main__ import main


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("localhost", "0")),
        ({"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}, ("node1", "29500")),
    ],
    ids=["single-process", "torchrun"],
)
def test_train_calls_the_entry_with_a_rendezvous(
    given: dict[str, str], expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # Restores both after the test.
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", [])
    received: list[list[str]] = []
    monkeypatch.setattr(pretrain, "main", lambda argv: received.append(argv) or 3)
    assert main(["train", "--config", "let_7b"]) == 3
    assert received == [["--config", "let_7b"]]
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == expected
