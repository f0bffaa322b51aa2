"""Fixtures of the whole suite: a small teacher, small data, and weights to start from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings

from megatron_let.compat import PatchSet, apply
from megatron_let.compat.cpu_shims import CudaDeviceAsCpu
from tests.helpers.data import write_indexed_data, write_short_documents
from tests.helpers.models import save_teacher
from tests.helpers.runs import train

# Tests share two cores with the ranks of other tests: a slow example is not a failure.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")

# The files that take minutes, the longest first.
LONGEST = (
    "launch/test_on_slurm",
    "distributed/test_training",
    "distributed/test_layout_matrix",
    "distributed/test_against_plain_reference",
    "distributed/test_quickstart",
    "distributed/test_checkpoint_writer",
    "distributed/test_cpu_host",
    "distributed/test_placement",
)
# It waits for a job that runs beside all others.
LAST = "distributed/test_oldest_torch"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first: started late, one of them would run alone at the end."""
    positions: dict[Path, int] = {}
    for item in items:
        positions[item.path] = min(_position(item), positions.get(item.path, _position(item)))
    items.sort(key=lambda item: positions[item.path])


def _position(item: pytest.Item) -> int:
    """Return a place in the order of files; a file has that of its first test."""
    name = f"{item.path.parent.name}/{item.path.stem}"
    if name in LONGEST:
        return LONGEST.index(name)
    if name == LAST:
        return len(LONGEST) + 3
    marks = ("distributed", "medium")
    later = [item.get_closest_marker(mark) is not None for mark in marks]
    return len(LONGEST) + [*later, True].index(True)


@pytest.fixture(autouse=True)
def host_patches_end_with_the_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo the CPU shims of a test that runs Megatron in this process."""
    with contextlib.ExitStack() as undo:
        apply_patches = apply.apply_host_patches

        def apply_and_remember(host: Any) -> PatchSet:
            patches = apply_patches(host)
            undo.callback(patches.undo)
            return patches

        def enter() -> None:
            undo.enter_context(CudaDeviceAsCpu())

        monkeypatch.setattr(apply, "apply_host_patches", apply_and_remember)
        monkeypatch.setattr(apply, "CudaDeviceAsCpu", lambda: SimpleNamespace(__enter__=enter))
        yield


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
