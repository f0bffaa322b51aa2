"""Step time and memory of DeepSpeed's ZeRO stages against Megatron's distributed optimizer.

Each turn runs every variant with the same model, data, teacher and flags, in alternating order, so
that other load affects all of them. Ratios are within a turn. Memory is the last rank's peak:
allocated on a GPU, resident on a CPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS_FOLDER, metrics_rows, run_entry
from rich.console import Console
from rich.table import Table

from megatron_let.files.names import METRICS
from megatron_let.metrics.provenance import processor, write_csv

LIBRARIES = ("torch", "megatron-core", "deepspeed")
BASELINE = "megatron, distributed optimizer"
ZERO: dict[str, dict[str, Any]] = {
    "deepspeed, ZeRO-1": {"stage": 1},
    "deepspeed, ZeRO-2": {"stage": 2},
    "deepspeed, ZeRO-3": {"stage": 3},
}
_WARM_UP_STEPS = 3


def main() -> int:
    """Measure every engine, print a table and write the CSV; return the exit code."""
    options, flags = _parse()
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in (BASELINE, *ZERO)}
    with tempfile.TemporaryDirectory() as name:
        for turn in range(options.turns):
            names = list(samples) if turn % 2 == 0 else list(samples)[::-1]
            for variant in names:
                folder = Path(name) / f"{turn}" / variant.replace(" ", "_")
                samples[variant].append(_run(variant, folder, options, flags))
    rows = [_row(variant, samples) for variant in samples]
    _print(rows)
    write_csv(RESULTS_FOLDER / "engines.csv", rows, _source(options, flags))
    return 0


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="Other flags go to the entry."
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="steps per run (default: 12)")
    parser.add_argument("--turns", type=int, default=3, help="runs per variant (default: 3)")
    parser.add_argument("--config", type=Path, required=True, help="recipe")
    return parser.parse_known_args()


def _run(
    variant: str, folder: Path, options: argparse.Namespace, flags: list[str]
) -> dict[str, float]:
    """Return the median step time and the peak memory of one run."""
    folder.mkdir(parents=True)
    metrics = folder / METRICS
    engine = ["--use-distributed-optimizer"]
    if variant in ZERO:
        config = folder / "deepspeed.json"
        config.write_text(json.dumps({"zero_optimization": ZERO[variant]}))
        engine += ["--engine", "deepspeed", "--deepspeed-config", str(config)]
    program = [
        *("-m", "megatron_let.pretrain", "--config", str(options.config)),
        *("--let-metrics-path", str(metrics), "--train-iters", str(options.steps)),
        *("--eval-iters", "0", *flags, *engine),
    ]
    run_entry(program, options.ranks, OMP_NUM_THREADS="1")
    rows = metrics_rows(metrics)
    assert rows[-1]["iteration"] == options.steps
    steps = rows[_WARM_UP_STEPS:]
    return {
        "step_seconds": statistics.median(step["step_seconds"] for step in steps),
        "memory_bytes": max(step["max_memory_bytes"] for step in steps),
    }


def _row(variant: str, samples: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    mine, baseline = samples[variant], samples[BASELINE]
    row: dict[str, Any] = {"engine": variant, "runs": len(mine)}
    for key, digits in (("step_seconds", 4), ("memory_bytes", 0)):
        values = [sample[key] for sample in mine]
        ratios = [a[key] / b[key] for a, b in zip(mine, baseline, strict=True)]
        row[key] = round(statistics.median(values), digits)
        row[f"{key}_ratio"] = round(statistics.median(ratios), 3)
        row[f"{key}_ratio_min"] = round(min(ratios), 3)
        row[f"{key}_ratio_max"] = round(max(ratios), 3)
    return row


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("engine", "step, s", "ratio", "memory, MiB", "ratio")
    for row in rows:
        table.add_row(
            row["engine"],
            f"{row['step_seconds']:.3f}",
            _spread(row, "step_seconds"),
            f"{row['memory_bytes'] / 2**20:.0f}",
            _spread(row, "memory_bytes"),
        )
    Console().print(table)


def _spread(row: dict[str, Any], key: str) -> str:
    low, high = row[f"{key}_ratio_min"], row[f"{key}_ratio_max"]
    return f"{row[f'{key}_ratio']:.3f} ({low:.3f}-{high:.3f})"


def _source(options: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    cpu = f"{processor()}, {os.cpu_count()} cores"
    command = f"tools/benchmark/engines.py --config {options.config} --ranks {options.ranks}"
    return {
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": " ".join(f"{name}=={importlib.metadata.version(name)}" for name in LIBRARIES),
        "command": f"{command} --steps {options.steps} --turns {options.turns} {' '.join(flags)}",
    }


if __name__ == "__main__":
    sys.exit(main())
