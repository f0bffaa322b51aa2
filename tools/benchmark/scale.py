"""Tables of docs/scale.md: step time with a teacher over pipelines, and the cost of failures.

    python tools/benchmark/scale.py steps       # simulated; writes results/scale.csv
    python tools/benchmark/scale.py teachers    # simulated; prints
    python tools/benchmark/scale.py failures    # closed forms; prints

`steps` simulates the recipe's student over pipeline sizes and numbers of microbatches with the
communication of the GPU's data sheet. A global batch has 1,024 sequences, so the number of
microbatches also fixes that of the replicas. `teachers` simulates the two layouts of the recipe
with deeper and deeper teachers: SmolLM2-1.7B with a multiple of its layers.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import CPU, RESULTS_FOLDER, source

from megatron_let.cli.common import print_table
from megatron_let.cli.plan import plan_one
from megatron_let.compat.device import prepare_process
from megatron_let.metrics.provenance import write_csv
from megatron_let.planner.estimate import Request, estimate
from megatron_let.planner.failures import checkpoint_interval, interruption_seconds, useful_share
from megatron_let.planner.memory import Layout, teacher_weights
from megatron_let.planner.teacher_group import teacher_group

RESULTS = RESULTS_FOLDER / "scale.csv"
GLOBAL_BATCH = 1024
# Stages -> layers and chunks per stage of the interleaved schedule. 80 layers do not divide by 32.
PIPELINES = {8: (80, 5), 16: (80, 5), 32: (96, 3)}
MICROBATCHES = (16, 32, 64, 128, 256)
TEACHERS = ("smollm2-1.7b", "llama-3.1-8b")
# The layouts of configs/let_70b.yaml: ranks, GPU, microbatch.
RECOMMENDED = (("512", "a100-80g", "2"), ("1024", "h100-80g", "1"))
DEPTHS = (1, 2, 3, 4, 5)

# Interruptions per GPU hour; docs/scale.md has the sources.
RATES = {
    "Llama 3 405B": 419 / (54 * 24 * 16384),
    "RSC-1, all nodes": 6.5e-3 / (24 * 8),
    "RSC-1, jobs of 1,024": 1 / (7.9 * 1024),
    "OPT-175B": 105 / (61 * 24 * 992),
}
CHECKPOINT_BYTES = 14 * 69e9
# Seconds for which a checkpoint stops training, by the way in which it is written.
WRITES = {
    "1 GB/s, blocking": CHECKPOINT_BYTES / 1e9,
    "25 GB/s, blocking": CHECKPOINT_BYTES / 25e9,
    "background": 10.0,
}
RESTARTS = {"requeued": 600.0, "in the job": 180.0, "in the process": 60.0}


def main() -> int:
    """Make one of the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", choices=("steps", "teachers", "failures"))
    parser.add_argument("--csv", type=Path, default=RESULTS, help="file to write (steps)")
    options = parser.parse_args()
    prepare_process(CPU, 0)
    make = {"steps": step_rows, "teachers": teacher_rows, "failures": failure_rows}
    rows = []
    for row in make[options.table]():
        rows.append(row)
        if options.table == "steps":
            print(*row.values(), flush=True)
    if options.table == "steps":
        write_csv(options.csv, rows, source())
    print_table(None, [[*rows[0]], *([*row.values()] for row in rows)], 160)
    return 0


def step_rows() -> Iterator[dict[str, Any]]:
    """Yield a row per teacher, pipeline, schedule and number of microbatches."""
    for teacher in TEACHERS:
        argv = ["--config", "let_70b", "--gpus", "512", "--gpu", "a100-80g", "--teacher", teacher]
        request, planned = plan_one(argv)
        for stages, (layers, chunks) in PIPELINES.items():
            sized = replace(request, student=replace(request.student, num_layers=layers))
            for num_chunks, m in itertools.product((1, chunks), MICROBATCHES):
                layout = replace(
                    planned.layout,
                    pp=stages,
                    num_chunks=num_chunks,
                    num_microbatches=m,
                    dp=GLOBAL_BATCH // planned.layout.micro_batch_size // m,
                )
                if num_chunks == 1 or m % stages == 0:
                    yield {"teacher": teacher, **step_row(sized, layout)}


def teacher_rows() -> Iterator[dict[str, Any]]:
    """Yield a row per recommended layout and depth of the teacher."""
    for gpus, gpu, micro_batch_size in RECOMMENDED:
        argv = ["--config", "let_70b", "--gpus", gpus, "--gpu", gpu]
        request, planned = plan_one([*argv, "--micro-batch-size", micro_batch_size])
        assert request.teacher is not None
        for depth in DEPTHS:
            teacher = replace(request.teacher, num_layers=depth * request.teacher.num_layers)
            deeper = replace(request, teacher=teacher)
            row = step_row(deeper, planned.layout)
            placed = min(row[name] for name in ("aligned-stage", "spread", "bubble"))
            yield {
                "layout": f"{gpus} {gpu}",
                "teacher": f"{teacher_weights(teacher) / 2e9:.1f}B",
                "GiB": f"{estimate(deeper, planned.layout).peak.total / 2**30:.1f}",
                "best placement": placed,
                "group": row["group"],
                "group_ranks": row["group_ranks"],
            }


def step_row(request: Request, layout: Layout) -> dict[str, Any]:
    """Return the simulated times of one layout, relative to a step without a teacher."""
    found = estimate(request, layout)
    steady = layout.num_microbatches * max(
        forward + backward
        for forward, backward in zip(found.costs.forward, found.costs.backward, strict=True)
    )
    group = teacher_group(request, layout, found.baseline_seconds)
    return {
        "p": layout.pp,
        "chunks": layout.num_chunks,
        "m": layout.num_microbatches,
        "dp": layout.dp,
        "baseline_seconds": round(found.baseline_seconds, 3),
        "idle": round(1 - steady / found.baseline_seconds, 4),
        **{name: round(s / found.baseline_seconds, 4) for name, s in found.seconds.items()},
        "group": round(group.cost_ratio, 4),
        "group_ranks": group.num_ranks,
    }


def failure_rows() -> Iterator[dict[str, Any]]:
    """Yield the best interval of checkpoints and the useful share of time."""
    for source_name, rate in RATES.items():
        for gpus in (512, 1024):
            between = interruption_seconds(rate, gpus)
            for write, save in WRITES.items():
                interval = checkpoint_interval(save, between)
                shares = {
                    name: f"{useful_share(interval, save, restart, between):.2%}"
                    for name, restart in RESTARTS.items()
                }
                yield {
                    "rate": source_name,
                    "GPUs": gpus,
                    "hours between": f"{between / 3600:.0f}",
                    "write": write,
                    "stops for s": f"{save:.0f}",
                    "interval min": f"{interval / 60:.0f}",
                    **shares,
                }


if __name__ == "__main__":
    sys.exit(main())
