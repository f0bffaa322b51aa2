"""Fixtures of the whole suite: a small teacher, small data, and weights to start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from tests.helpers.data import write_indexed_data, write_short_documents
from tests.helpers.models import save_teacher
from tests.helpers.runs import train

# Tests share two cores with the ranks of other tests: a slow example is not a failure.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama teacher, 48 wide."""
    return save_teacher(tmp_path_factory.mktemp("teacher") / "llama")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of an indexed data set of 256 tokens."""
    return write_indexed_data(tmp_path_factory.mktemp("data") / "walks")


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a data set of short documents, each with an end-of-document token."""
    return write_short_documents(tmp_path_factory.mktemp("documents") / "short")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> Path:
    """Checkpoint of a student after 20 steps, whose cosine is well above 0."""
    folder = tmp_path_factory.mktemp("weights")
    train(
        folder, "--data-path", data, "--save", folder / "checkpoint", "--save-interval", 20,
        "--train-iters", 20, "--let-weight", 20, "--let-stop-step", 100, "--lr", 1e-2,
        TEACHER=str(teacher),
    )  # fmt: skip
    return folder / "checkpoint"
