"""Locks of killed kernel builds."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megatron_let.doctor import kernels


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock that a killed build of a kernel leaves."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    file = tmp_path / "cpu_adam/lock"
    file.parent.mkdir()
    file.touch()
    return file


def test_stale_lock_is_reported_and_removed(lock: Path) -> None:
    before = time.time() - 2 * kernels.LONGEST_BUILD
    os.utime(lock, (before, before))
    (check,) = kernels.check_locks()
    # Not every run needs the kernel, so the node stays fit.
    assert check.ok and str(lock) in check.path and "doctor --build" in check.path
    reported: list[str] = []
    assert kernels.remove_stale_locks(reported.append) == {} and not lock.exists()
    assert len(reported) == 1 and reported[0].startswith("cpu_adam:")
    assert kernels.check_locks() == []


def test_recent_lock_is_reported_and_kept(lock: Path) -> None:
    (check,) = kernels.check_locks()
    assert str(lock) in check.path and "another machine" in check.path
    # The kernel is not built, because the build would wait for the lock.
    assert kernels.remove_stale_locks(print).keys() == {"cpu_adam"} and lock.exists()


def test_lock_of_a_running_build_is_kept(lock: Path) -> None:
    before = time.time() - 2 * kernels.LONGEST_BUILD
    os.utime(lock, (before, before))
    with lock.open():
        assert kernels.check_locks() == []
        assert kernels.remove_stale_locks(print) == {} and lock.exists()


def test_default_extensions_folder_is_torchs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr("torch.utils.cpp_extension.get_default_build_root", lambda: str(tmp_path))
    (tmp_path / "py312_cu130/async_io").mkdir(parents=True)
    (tmp_path / "py312_cu130/async_io/lock").touch()
    (found,) = kernels.find_locks()
    assert (found.kernel, found.state) == ("async_io", "recent")
