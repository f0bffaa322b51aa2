"""Run the entry and read its metrics."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.helpers import forked_ranks
from tests.helpers.forked_ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 300
# Variables that only the entry reads; libraries read others while they are imported.
READ_BY_THE_ENTRY = {"TEACHER", "OUTPUT", "DATA"}
# Asked before any test applies the CPU shims to this process, which answer yes.
HAS_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Run:
    """A finished run: its exit code, what it printed, and its metrics file."""

    returncode: int
    log: str
    metrics_path: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return all rows of the metrics file."""
        if not self.metrics_path.exists():
            return []
        return [json.loads(line) for line in self.metrics_path.read_text().splitlines()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Return the last training row of each iteration."""
        rows = {row["iteration"]: row for row in self.rows if "lm_loss" in row}
        return [rows[iteration] for iteration in sorted(rows)]

    @property
    def error(self) -> str:
        """Return the first error line of the log."""
        lines = [line for line in self.log.splitlines() if "megatron_let: error" in line]
        assert lines, f"no error line in:\n{self.log[-3000:]}"
        return lines[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(ranks: int, module: str = "megatron_let.pretrain") -> list[str]:
    """Return the torchrun command for one machine, on a free port."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--master-addr", "127.0.0.1", "--master-port", str(free_port()), "-m", module,
    ]  # fmt: skip


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a run: one thread per process, and no network."""
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": search_path()}
    return {**os.environ, **fixed, **variables}


def search_path() -> str:
    """Return the PYTHONPATH of this repository and of the Megatron that is tested."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def train(
    folder: Path,
    *flags: str | Path | int | float,
    ranks: int = 1,
    config: str | None = "configs/tiny.yaml",
    check: bool = True,
    module: str = "megatron_let.pretrain",
    **variables: str,
) -> Run:
    """Run the entry with these flags after the recipe; it writes `folder`/metrics.jsonl.

    The ranks are forks, or processes of torchrun where a fork cannot do: on a GPU, and with a
    variable that is read by an import.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metrics = folder / "metrics.jsonl"
    recipe = ["--config", str(ROOT / config)] if config else []
    argv = [*recipe, "--let-metrics-path", str(metrics), *map(str, flags)]
    if HAS_GPU or not variables.keys() <= READ_BY_THE_ENTRY:
        returncode, log = _torchrun(module, argv, ranks, folder, environment(**variables))
    else:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        with tempfile.TemporaryDirectory() as other:
            path = Path(other) / "log"
            address |= environment(**variables)
            returncode = run_ranks(module, argv, ranks, folder, address, path, TIMEOUT_SECONDS)
            log = path.read_text(errors="replace")
    run = Run(returncode, log, metrics)
    assert not check or run.returncode == 0, _first_failure(run.log)
    return run


def call_ranks(function: Callable[..., None], *args: Any, ranks: int) -> None:
    """Call a module's function on each rank of a gloo job."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        variables = environment(**address)
        code = forked_ranks.call_ranks(function, args, ranks, variables, log, TIMEOUT_SECONDS)
        assert code == 0, _first_failure(log.read_text(errors="replace"))


def _torchrun(
    module: str, argv: list[str], ranks: int, folder: Path, variables: dict[str, str]
) -> tuple[int, str]:
    """Return the exit code of torchrun and what was printed."""
    process = subprocess.Popen(
        [*command(ranks, module), *argv], cwd=folder, env=variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        log, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        # The ranks survive a torchrun that is killed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, log


def _first_failure(log: str) -> str:
    """Return the lines of the rank that failed first, and torchrun's summary."""
    _, _, summary = log.rpartition("Root Cause")
    first = re.search(r"rank\s*: (\d+)", summary)
    if first is None:
        return log[-6000:]
    mark = f"[rank{first[1]}]"
    lines = [line for line in log.splitlines() if line.startswith(mark) or ": error" in line]
    return "\n".join([*lines[-60:], summary])


def largest_difference(ours: Run, theirs: Run, key: str) -> float:
    """Return the largest relative difference of one metric over the steps of two runs."""
    pairs = list(zip(ours.steps, theirs.steps, strict=True))
    assert pairs and any(key in step for step, _ in pairs), f"no {key} was logged"
    assert all((key in a) == (key in b) for a, b in pairs), f"{key} is missing in some rows"
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in pairs if key in b)
