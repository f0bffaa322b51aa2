"""The virtual cluster, started once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster, missing
from tests.launch.jobs import Launcher


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(f"needs a real Slurm: {reason}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(autouse=True)
def no_job_is_left(cluster: Cluster) -> Iterator[None]:
    """Cancel the job of a failed test, which would block the nodes for the next one."""
    yield
    cluster.cancel_all()


@pytest.fixture(scope="session")
def launcher(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, data: Path, teacher: Path
) -> Launcher:
    return Launcher(cluster, tmp_path_factory.mktemp("launch"), data, teacher)
