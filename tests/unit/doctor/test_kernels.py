"""Locks of killed kernel builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_let.doctor.kernels import check_locks


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock that a killed build of a kernel leaves."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    file = tmp_path / "cpu_adam/lock"
    file.parent.mkdir()
    file.touch()
    return file


def test_lock_of_a_killed_build_is_reported(lock: Path) -> None:
    (check,) = check_locks()
    # Not every run needs the kernel, so the node stays fit.
    assert check.ok and "cpu_adam" in check.found and str(lock) in check.path
    lock.unlink()
    assert check_locks() == []


def test_lock_of_a_running_build_is_not_reported(lock: Path) -> None:
    with lock.open():
        assert check_locks() == []


def test_default_extensions_folder_is_torchs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr("torch.utils.cpp_extension.get_default_build_root", lambda: str(tmp_path))
    (tmp_path / "py312_cu130/async_io").mkdir(parents=True)
    (tmp_path / "py312_cu130/async_io/lock").touch()
    (found,) = check_locks()
    assert "async_io" in found.found
