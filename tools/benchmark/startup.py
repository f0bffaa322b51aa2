"""Communication and CPU time of the start of a run, over the number of ranks.

    python tools/benchmark/startup.py [--ranks 8 16 32 64] [--output FILE]

Starts tiny runs of the entry under gloo (TP 2, PP 2, `--let-placement spread`), whose ranks are
forks of one process that has imported everything, and counts what each part of the start sends up
to the end of the first step (startup_run.py). Messages, bytes and groups are exact. Seconds are
those of this machine: CPU seconds are a rank's mean, and `wall` is the slowest rank's, on fewer
cores than ranks.

A number of ranks is left out if, by the memory of the run before, it would need more than --gib.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from common import RESULTS_FOLDER, ROOT, save_teacher, source

from megatron_let.cli.common import print_table
from megatron_let.metrics.provenance import write_csv
from megatron_let.planner.sizes import TransformerSize
from tests.helpers.forked_ranks import run_ranks
from tests.helpers.runs import environment, free_port

RESULTS = RESULTS_FOLDER / "startup.csv"
PROGRAM = "tools.benchmark.startup_run"
TENSOR_PARALLEL, STAGES, MICROBATCHES, VOCAB = 2, 2, 2, 256
TIMEOUT_SECONDS = 1800
VALUES = ("messages", "bytes", "groups", "cpu", "wall")


def main() -> int:
    """Measure each number of ranks, print the table and write the results."""
    options = _parse()
    rows: list[dict[str, Any]] = []
    gib_per_rank = 0.0
    with tempfile.TemporaryDirectory() as name:
        size = TransformerSize(2, 64, 176, 4, 4, 16, True, VOCAB)
        teacher = save_teacher(Path(name) / "teacher", size, 64)
        for ranks in options.ranks:
            if gib_per_rank * ranks > options.gib:
                print(f"{ranks} ranks would need {gib_per_rank * ranks:.1f} GiB: left out")
                continue
            found, gib = _start(Path(name) / str(ranks), ranks, teacher)
            gib_per_rank = gib / ranks
            rows += found
            _print(found, gib)
    if not rows:
        return 1
    write_csv(options.output, rows, source())
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--gib", type=float, default=8.0, help="most memory of all ranks together")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def _start(folder: Path, ranks: int, teacher: Path) -> tuple[list[dict[str, Any]], float]:
    """Run one step on these ranks; return a row per part, and the peak memory in GiB."""
    folder.mkdir()
    replicas = ranks // (TENSOR_PARALLEL * STAGES)
    flags = [
        str(folder), "--config", str(ROOT / "configs" / "tiny.yaml"), "--mock-data",
        "--tensor-model-parallel-size", str(TENSOR_PARALLEL), "--sequence-parallel",
        "--pipeline-model-parallel-size", str(STAGES), "--use-distributed-optimizer",
        "--micro-batch-size", "1", "--global-batch-size", str(replicas * MICROBATCHES),
        "--train-iters", "1", "--lr-warmup-iters", "0", "--eval-iters", "0",
        "--let-placement", "spread",
        "--distributed-timeout-minutes", "30",
    ]  # fmt: skip
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables = environment(TEACHER=str(teacher), **address)
    log = folder / "log"
    with _peak_memory() as peak:
        code = run_ranks(PROGRAM, flags, ranks, folder, variables, log, TIMEOUT_SECONDS)
    if code:
        sys.exit(f"{ranks} ranks failed:\n{log.read_text()[-4000:]}")
    files = sorted(folder.glob("rank_*.json"))
    assert len(files) == ranks, "a rank wrote no result"
    parts = [json.loads(file.read_text()) for file in files]
    return [_row(ranks, part, parts, peak[0]) for part in parts[0]], peak[0]


def _row(ranks: int, part: str, found: list[dict[str, Any]], gib: float) -> dict[str, Any]:
    """Return the largest counts of a rank, the mean CPU seconds and the longest seconds."""
    values = {name: [rank.get(part, {}).get(name, 0) for rank in found] for name in VALUES}
    return {
        "ranks": ranks,
        "part": part,
        "messages": int(max(values["messages"])),
        "bytes": int(max(values["bytes"])),
        "new groups": int(max(values["groups"])),
        "cpu seconds per rank": round(sum(values["cpu"]) / ranks, 3),
        "wall seconds": round(max(values["wall"]), 2),
        "GiB of all ranks": round(gib, 2),
    }


@contextlib.contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """Yield a list whose item is, at the end, the peak memory of the ranks in GiB.

    A rank's share of the pages that it has in common with others counts once (PSS).
    """
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(1):
            peak[0] = max(peak[0], _memory_of_ranks())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _memory_of_ranks() -> float:
    total = 0
    for process in psutil.Process().children(recursive=True):
        # It may end while it is looked at.
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 2**30


def _print(rows: list[dict[str, Any]], gib: float) -> None:
    columns = [name for name in rows[0] if name not in ("ranks", "GiB of all ranks")]
    cells = [[row[name] for name in columns] for row in rows]
    print_table(f"{rows[0]['ranks']} ranks, {gib:.2f} GiB", [columns, *cells], width=120)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    code = main()
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(code)
