"""Restarts within the job by ft_launcher: when it is used, and what Megatron and it are told."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from types import ModuleType
from typing import Any

import pytest

from megatron_let.compat import PatchSet
from megatron_let.doctor.packages import resiliency
from megatron_let.errors import LETError
from megatron_let.run import restarts_in_job


def install(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """Let the package appear installed in this version, or not at all."""

    def found(name: str) -> str:
        if name != restarts_in_job.DISTRIBUTION or version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)


@pytest.mark.parametrize(
    ("version", "usable", "path"),
    [
        (None, False, "torchrun; recipes save"),
        ("0.4.1", False, "older than 0.6: launch/ starts ranks with torchrun"),
        ("0.6.0", True, "uses its ft_launcher"),
        ("0.10.0", True, "uses its ft_launcher"),
    ],
)
def test_installed_version_decides_and_the_doctor_names_it(
    version: str | None,
    usable: bool,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(monkeypatch, version)
    monkeypatch.setattr(sys, "argv", ["restarts_in_job"])
    restarts_in_job.main()
    assert capsys.readouterr().out == ("yes\n" if usable else "no\n")
    check = resiliency()
    assert check.ok and check.found == (version or "none") and path in check.path


def arguments(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"enable_ft_package": True, "save": "/run", **values})


@pytest.mark.parametrize(
    ("values", "started", "named"),
    [
        ({}, False, "ft_launcher"),
        ({"save": None}, True, "--save"),
        ({}, True, None),
        ({"enable_ft_package": False, "save": None}, False, None),
    ],
)
def test_flag_without_launcher_or_folder_is_refused(
    values: dict[str, Any], started: bool, named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FT_RANK_MONITOR_IPC_SOCKET", raising=False)
    if started:
        monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", "/tmp/socket")
    if named is None:
        restarts_in_job.check_arguments(arguments(**values))
    else:
        with pytest.raises(LETError, match=named):
            restarts_in_job.check_arguments(arguments(**values))


@pytest.mark.medium
def test_setup_reads_the_arguments_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training import ft_integration

    # A command line with a recipe, as Megatron's own setup would parse it.
    monkeypatch.setattr(sys, "argv", ["pretrain", "--config", "recipe.yaml"])
    args, parser = arguments(save=None), ft_integration.arguments
    patches = PatchSet().apply_all(restarts_in_job.wrappers(args))
    package = ModuleType("nvidia_resiliency_ext.fault_tolerance")
    package.RankMonitorClient = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", ModuleType("nvidia_resiliency_ext"))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    try:
        # Its own error about these arguments shows that it read them.
        with pytest.raises(ValueError, match="save dir must be set"):
            ft_integration.setup()
    finally:
        patches.undo()
    assert ft_integration.arguments is parser
    assert restarts_in_job.wrappers(arguments(enable_ft_package=False)) == {}


@pytest.mark.parametrize(("code", "asked"), [(16, True), (17, True), (2, False), (1, False)])
def test_exit_code_that_would_come_again_ends_the_job(
    code: int, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    data = ModuleType("nvidia_resiliency_ext.fault_tolerance.data")
    data.WorkloadAction = argparse.Namespace(ShutdownWorkload="shutdown")  # type: ignore[attr-defined]
    data.WorkloadControlRequest = lambda *values: values  # type: ignore[attr-defined]
    connector = ModuleType("nvidia_resiliency_ext.fault_tolerance.ipc_connector")
    connector.IpcConnector = lambda path: argparse.Namespace(  # type: ignore[attr-defined]
        send=lambda message: sent.append((path, message))
    )
    for name in ("nvidia_resiliency_ext", "nvidia_resiliency_ext.fault_tolerance"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (data, connector):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("FT_LAUNCHER_IPC_SOCKET", raising=False)
    restarts_in_job.end_job_after(code)
    assert not sent
    monkeypatch.setenv("FT_LAUNCHER_IPC_SOCKET", "/tmp/socket")
    restarts_in_job.end_job_after(code)
    expected = [("/tmp/socket", (3, ("shutdown", f"exit code {code}")))]
    assert sent == (expected if asked else [])
