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
# Variables that a fork can have: the entry reads them, or huggingface_hub, whose constants a rank
# reads again. Libraries read others while they are imported.
READ_BY_A_RANK = {
    "TEACHER", "OUTPUT", "DATA", "MEGATRON_LET_CACHE", "NO_PROXY",
    "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET",
    "HF_HUB_OFFLINE",
}  # fmt: skip
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
    run = run_forked if variables.keys() <= READ_BY_A_RANK else _torchrun
    returncode, log = run(
        module, *argv, folder=folder, ranks=ranks, seconds=TIMEOUT_SECONDS, **variables
    )
    finished = Run(returncode, log, metrics)
    assert not check or finished.returncode == 0, _first_failure(finished.log)
    return finished


def run_forked(
    module: str,
    *argv: object,
    folder: Path,
    ranks: int = 1,
    seconds: float = TIMEOUT_SECONDS,
    **variables: str,
) -> tuple[int, str]:
    """Run `-m module argv` as forks in `folder`; on a GPU, which a fork cannot use, by torchrun.

    Returns:
        torchrun's exit code, and what all ranks printed.
    """
    if HAS_GPU:
        return _torchrun(module, *argv, folder=folder, ranks=ranks, seconds=seconds, **variables)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as other:
        log = Path(other) / "log"
        log.touch()
        code = run_ranks(
            module, list(map(str, argv)), ranks, folder, address | environment(**variables), log,
            seconds,
        )  # fmt: skip
        return code, log.read_text(errors="replace")


def call_ranks(function: Callable[..., None], *args: Any, ranks: int) -> None:
    """Call a module's function on each rank of a gloo job."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        variables = environment(**address)
        code = forked_ranks.call_ranks(function, args, ranks, variables, log, TIMEOUT_SECONDS)
        assert code == 0, _first_failure(log.read_text(errors="replace"))


def _torchrun(
    module: str,
    *argv: object,
    folder: Path,
    ranks: int,
    seconds: float = TIMEOUT_SECONDS,
    **variables: str,
) -> tuple[int, str]:
    """Return the exit code of torchrun and what was printed."""
    process = subprocess.Popen(
        [*command(ranks, module), *map(str, argv)], cwd=folder, env=environment(**variables),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        log, _ = process.communicate(timeout=seconds)
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
