"""Memory of the recipes' runs: Megatron's code under fake tensors, next to the planner's figures.

    python tools/benchmark/memory.py

Every row is one rank: its parameters, gradients, optimizer and everything else that the forward
and backward passes of a step hold at their peak, as `fake_training.measure` counts them, and what
`tools/plan_run.py` predicts. It needs no GPU and little memory.
"""

import argparse
import contextlib
import logging
import multiprocessing
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import CPU, RESULTS_FOLDER, source
from fake_training import FakeRun, measure

from megatron_let.cli.plan import plan_one
from megatron_let.compat.device import prepare_process
from megatron_let.metrics.provenance import write_csv
from megatron_let.planner.estimate import Estimate, Request
from megatron_let.planner.memory import StageMemory

RESULTS = RESULTS_FOLDER / "memory.csv"
GIB = 2**30
PARTS = ("params", "grads", "optimizer", "activations", "teacher_weights", "total")
NONE: tuple[str, ...] = ()
SELECTIVE = ("--recompute-granularity", "selective")
WHOLE = ("--recompute-granularity", "full", "--recompute-method")
FULL = (*WHOLE, "uniform", "--recompute-num-layers", "1")
BLOCK = (*WHOLE, "block", "--recompute-num-layers", "4")
TP2 = ("--tensor-model-parallel-size", "2")
TP8 = ("--tensor-model-parallel-size", "8", "--sequence-parallel")
SP = ("--sequence-parallel",)
PP2 = ("--pipeline-model-parallel-size", "2")
PP4 = ("--pipeline-model-parallel-size", "4")
B1 = ("--micro-batch-size", "1")
CP2 = ("--context-parallel-size", "2")


@dataclass(frozen=True)
class Case:
    """A layout of a recipe.

    Attributes:
        recipe: its name in configs/, or its path.
        chunks: model chunks per stage.
        stages: pipeline stages to measure.
        gpus: number and type of the ranks.
        teacher: name in the planner's `TEACHERS`; empty for the recipe's.
    """

    recipe: str
    flags: tuple[str, ...] = ()
    chunks: int = 1
    stages: tuple[int, ...] = (0,)
    gpus: str = "32 a100-80g"
    teacher: str = ""


def cases() -> Iterator[Case]:
    """Yield the paper's runs: their layout, every recompute mode, and every kind of parallelism."""
    for size in ("1p4b", "3b", "7b"):
        for recompute in (NONE, SELECTIVE, FULL):
            yield Case(f"baseline_{size}", recompute)
        yield Case(f"let_{size}")
    yield Case("baseline_1p4b", BLOCK)
    yield Case("baseline_1p4b", CP2)
    yield Case("baseline_1p4b", PP4, stages=(0, 3))
    yield Case("baseline_1p4b", (*PP4, *FULL), stages=(0, 3))
    yield Case("baseline_3b", TP2)
    yield Case("baseline_3b", (*TP2, *SP))
    yield Case("let_3b", (*TP2, *SP))
    yield Case("baseline_3b", PP2, stages=(0, 1))
    yield Case("baseline_7b", (*TP2, *SP))
    yield Case("baseline_7b", (*TP2, *SP, *FULL))
    yield Case("baseline_7b", TP8)
    yield Case("baseline_7b", PP4, stages=(0, 3))
    yield Case("let_7b", FULL)
    yield Case("let_7b", (*PP4, "--let-max-prefetch", "8"), stages=(0, 3))
    yield Case("baseline_7b", PP2, chunks=2, stages=(0, 1))
    yield Case("baseline_7b", (*TP2, *SP, *PP2, *CP2), stages=(0, 1))
    yield from cases_70b()
    yield from cases_experts()


def cases_70b() -> Iterator[Case]:
    """Yield the fullest and the emptiest rank of each layout of docs/scale.md, and its choices.

    A measured pipeline has as many microbatches as fill it: `--let-max-prefetch` is that number.
    """
    held, ends = ("--let-max-prefetch", "16"), (0, 7)
    a100: dict[str, Any] = {"chunks": 5, "gpus": "512 a100-80g"}
    h100: dict[str, Any] = {"chunks": 5, "gpus": "1024 h100-80g"}
    yield Case("let_70b", held, stages=ends, **a100)
    yield Case("let_70b", (*B1, *held), stages=ends, **h100)
    yield Case("let_70b", (*TP8, "--micro-batch-size", "4", *held), stages=ends, **a100)
    yield Case("let_70b", (*CP2, *held), stages=ends, **a100)
    yield Case("let_70b", (*SELECTIVE, *held), **a100)
    yield Case("let_70b", (*FULL, *held), stages=ends, **a100)
    yield Case("let_70b", (*TP8, *held), stages=ends, teacher="llama-3.1-8b", **a100)
    yield Case("let_70b", (*B1, *held), stages=ends, teacher="llama-3.1-8b", **h100)
    deep, ends = ("--pipeline-model-parallel-size", "16", "--let-max-prefetch", "32"), (0, 15)
    yield Case("let_70b", deep, stages=ends, **a100)
    yield Case("let_70b", (*TP8, *deep), stages=ends, **a100)


def cases_experts() -> Iterator[Case]:
    """Yield a few layers of the mixture of experts, with local experts (`SequentialMLP`)."""
    local = ("--no-moe-grouped-gemm", "--num-layers")
    yield Case("baseline_moe_7b_a1b", (*local, "2"))
    yield Case("baseline_moe_7b_a1b", (*local, "4", *PP2))


def main() -> int:
    """Measure, print a line per rank, write the CSV; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", nargs="+", help="recipes to measure, by name or path")
    parser.add_argument("--jobs", type=int, default=1, help="measurements at a time")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="file to write")
    options = parser.parse_args()
    prepare_process(CPU, 0)
    # Planned before the forks, so that they inherit the imported Megatron.
    planned = [(case, *planned_run(case)) for case in _chosen(options.recipes)]
    tasks = [(*run, stage) for run in planned for stage in run[0].stages]
    # One fork per measurement, which changes torch for the rest of its process.
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool:
        rows = []
        for row in pool.imap(_row, tasks, chunksize=1):
            rows.append(row)
            # Every row takes minutes: keep those of a run that is stopped.
            write_csv(options.csv, rows, source())
    return 0


def _chosen(recipes: list[str] | None) -> list[Case]:
    if recipes is None:
        return list(cases())
    files = [Case(name) for name in recipes if name.endswith(".yaml")]
    return files + [case for case in cases() if case.recipe in recipes]


def _row(task: tuple[Case, Request, Estimate, int]) -> dict[str, Any]:
    """Return the row of one stage: the case, and each part as measured and as planned."""
    case, request, planned, stage = task
    # Silence Megatron.
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    with contextlib.redirect_stdout(None):
        measured = measure(FakeRun(Path(case.recipe), case.flags, stage, request, planned))
    predicted = predicted_parts(planned.memory[stage])
    row: dict[str, Any] = {
        "recipe": Path(case.recipe).stem,
        "flags": " ".join(case.flags),
        "chunks": case.chunks,
        "stage": stage,
        "gpus": case.gpus,
        "teacher": case.teacher,
    }
    for part in PARTS:
        row[f"measured_{part}_gib"] = round(measured[part] / GIB, 4)
        row[f"planned_{part}_gib"] = round(predicted[part] / GIB, 4)
        row[f"{part}_ratio"] = round(predicted[part] / measured[part], 4) if measured[part] else 1.0
    print(*list(row.values())[:4], row["activations_ratio"], row["total_ratio"], flush=True)
    return row


def predicted_parts(stage: StageMemory) -> dict[str, int]:
    """Return the planner's bytes; as in the measurement, activations include teacher buffers."""
    parts = {part: getattr(stage, part) for part in PARTS}
    parts["activations"] += stage.teacher_buffers
    return parts


def planned_run(case: Case) -> tuple[Request, Estimate]:
    """Return the request and the estimate of `tools/plan_run.py` for a case."""
    number, gpu = case.gpus.split()
    argv = ["--config", case.recipe, "--gpus", number, "--gpu", gpu, "--vpp", str(case.chunks)]
    argv += ["--teacher", case.teacher] if case.teacher else []
    return plan_one([*argv, *case.flags])


if __name__ == "__main__":
    sys.exit(main())
