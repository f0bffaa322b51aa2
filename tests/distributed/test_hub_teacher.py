"""A teacher from the Hugging Face Hub through the training entry, with a local hub server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.hub_server import HubServer
from tests.helpers.runs import Run, largest_difference, train

pytestmark = pytest.mark.distributed

ID = "small/llama"


def run(folder: Path, data: Path, teacher: str | Path, **variables: str) -> Run:
    return train(
        folder, "--data-path", data, "--train-iters", 3, "--eval-iters", 0, "--let-weight", 1.0,
        "--pipeline-model-parallel-size", 2, "--let-teacher", teacher,
        ranks=2, TEACHER="unused", **variables,
    )  # fmt: skip


def test_hub_id_gives_metrics_of_folder(teacher: Path, data: Path, tmp_path: Path) -> None:
    expected = run(tmp_path / "folder", data, teacher)
    with HubServer() as hub:
        commit = hub.commit(ID, teacher)
        variables = hub.environment(tmp_path / "cache")
        online = run(tmp_path / "online", data, ID, **variables)
    # The server is down: the second run repeats the first one from the local cache.
    pinned = run(tmp_path / "pinned", data, f"{ID}@{commit}", **variables)
    assert hub.downloads() == ["config.json", "model.safetensors"]
    for found in (online, pinned):
        assert found.log.count(f"LET: the teacher is {ID}@{commit}") == 1
        for key in ("lm_loss", "let_cosine", "grad_norm"):
            assert largest_difference(found, expected, key) == 0, key
