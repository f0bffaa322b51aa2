"""Restarts within the job: ranks under `ft_launcher` of nvidia-resiliency-ext.

Megatron's `--enable-ft-package` reports each step to a monitor, which kills a rank that hangs; the
launcher then restarts the ranks of all nodes.

    python -m megatron_let.run.restarts_in_job                # prints whether it can be used
    python -m megatron_let.run.restarts_in_job ARGUMENTS      # is ft_launcher
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from packaging.version import Version

from megatron_let.errors import LETError

DISTRIBUTION = "nvidia-resiliency-ext"
# The version that megatron-core 0.19 requires; 0.4 lacks a parameter that Megatron passes.
OLDEST = "0.6"
# Set by ft_launcher for each rank.
_MONITOR, _LAUNCHER = "FT_RANK_MONITOR_IPC_SOCKET", "FT_LAUNCHER_IPC_SOCKET"
_SETUP = "megatron.training.ft_integration:setup"
# Megatron's request for another GPU, and its verdict that a result is invalid.
_FINAL_EXIT_CODES = (16, 17)


def has_ft_launcher() -> bool:
    """Return whether a version is installed that works with this Megatron."""
    try:
        installed = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return False
    return Version(installed) >= Version(OLDEST)


def check_arguments(args: argparse.Namespace) -> None:
    """Check that `--enable-ft-package` has its launcher and a folder for its timeouts.

    Raises:
        LETError: it has not.
    """
    if not args.enable_ft_package:
        return
    if _MONITOR not in os.environ:
        raise LETError(
            f"--enable-ft-package needs ranks that ft_launcher of {DISTRIBUTION} {OLDEST} or newer"
            " has started; start them with it, or omit the flag."
        )
    if args.save is None:
        raise LETError("--enable-ft-package needs a folder for its timeouts; give --save.")


def wrappers(args: argparse.Namespace) -> dict[str, Callable[[Any], Any]]:
    """Return {patch target: wrapper} of a run with `--enable-ft-package`, else nothing."""

    def wrap(original: Callable[[], None]) -> Callable[[], None]:
        def setup() -> None:
            from megatron.training import ft_integration

            parser = ft_integration.arguments
            ft_integration.arguments = SimpleNamespace(parse_args=lambda **_: args)
            try:
                original()
            finally:
                ft_integration.arguments = parser

        return setup

    return {_SETUP: wrap} if args.enable_ft_package else {}


def end_job_after(exit_code: object) -> None:
    """Ask for no restart after an exit code that another start on the same GPUs would repeat."""
    if exit_code in _FINAL_EXIT_CODES:
        end_job(f"exit code {exit_code}")


def end_job(reason: str) -> None:
    """Ask ft_launcher, if it started this rank, to end all ranks instead of restarting them."""
    if _LAUNCHER not in os.environ:
        return
    from nvidia_resiliency_ext.fault_tolerance.data import (
        WorkloadAction,
        WorkloadControlRequest,
    )
    from nvidia_resiliency_ext.fault_tolerance.ipc_connector import IpcConnector

    request = WorkloadControlRequest(WorkloadAction.ShutdownWorkload, reason)
    IpcConnector(os.environ[_LAUNCHER]).send((int(os.environ["RANK"]), request))


def main() -> None:
    """Print whether ft_launcher can be used; with arguments, run it."""
    if len(sys.argv) == 1:
        print("yes" if has_ft_launcher() else "no")
        return
    from nvidia_resiliency_ext.fault_tolerance import launcher

    launcher.main()


if __name__ == "__main__":
    main()
