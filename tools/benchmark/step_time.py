"""Step time and peak memory with a teacher over a baseline, on one GPU, for LET and ModelOpt.

    python tools/benchmark/step_time.py [--teacher $TEACHER]      # the paper's 1.4B and 135M

A run of the entry alternates blocks of steps without and with a teacher. The first steps of a
block, which load the teacher, allocate and compile, are not counted. A ratio is the median step of
a block with a teacher over the mean of its two neighbours' medians. ModelOpt's distillation wrapper
(the cosine of layer k through its projection, with LET's weight) runs separately; its blocks
without a teacher call `only_student_forward`. Memory of both is relative to the peak of the first
block of LET's run, which has not loaded a teacher. A CPU reports no peak per step, so these columns
stay empty.

Without --teacher, a random teacher of SmolLM2-135M's shape is used: weights do not affect the time.
Data is Megatron's mock data. Other flags go to the entry. docs/placement.md has the targets.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from common import RESULTS_FOLDER, ROOT, run_entry, save_teacher, source

from megatron_let.cli.common import print_table
from megatron_let.metrics.provenance import write_csv
from megatron_let.metrics.read import load_metrics
from megatron_let.planner.sizes import TEACHERS, teacher_size

RESULTS = RESULTS_FOLDER / "step_time.csv"
WORKER = Path(__file__).with_name("step_time_run.py")
# The other sections of a recipe name data and folders.
SECTIONS = ("model", "optimization", "parallelism", "let")
SETTLING = 2
FIGURES = ("step_ratio", "step_ratio_q25", "step_ratio_q75", "peak_ratio", "peak_ratio_after")
Step = dict[str, Any]
Block = list[Step]


def main() -> int:
    """Run, compare, print and write the CSV; return the exit code."""
    options, flags = _parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = options.teacher or save_teacher(
            folder / "teacher", TEACHERS["smollm2-135m"], 2048
        )
        has_peaks = torch.cuda.is_available()
        columns = {
            "device": torch.cuda.get_device_name() if has_peaks else "CPU",
            "config": options.config.name,
            "micro_batch_size": options.micro_batch_size,
            "microbatches": options.microbatches,
        }
        rows: list[dict[str, Any]] = []
        baseline_peak = None
        for method in methods():
            run = blocks(train(method, folder, teacher, options, flags), options.steps)
            if has_peaks and method == "let":
                baseline_peak = peak(run[0])
            rows.append({"method": method, **figures(run, baseline_peak)})
            # After each method, so that a benchmark that is stopped leaves what it had.
            write_csv(options.csv, rows, columns | source())
    _print(rows)
    return 0


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Other flags go to the entry.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "let_1p4b.yaml")
    parser.add_argument("--teacher", type=Path, help="folder (default: a random SmolLM2-135M)")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="the paper's: 16")
    parser.add_argument(
        "--microbatches", type=int, default=4, help="microbatches per step (the paper's: 4)"
    )
    parser.add_argument("--cycles", type=int, default=5, help="blocks with a teacher (default: 5)")
    parser.add_argument("--steps", type=int, default=8, help="counted steps per block (default: 8)")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="file to write")
    options, flags = parser.parse_known_args()
    if options.cycles < 2 or options.steps < 1:
        parser.error("--cycles must be at least 2 (for quartiles) and --steps at least 1")
    return options, flags


def methods() -> list[str]:
    """Return LET, and ModelOpt if it is installed."""
    if importlib.util.find_spec("modelopt") is not None:
        return ["let", "modelopt"]
    print("modelopt left out: pip install -c constraints.txt nvidia-modelopt to include it")
    return ["let"]


# The runs


def train(
    method: str, folder: Path, teacher: Path, options: argparse.Namespace, flags: list[str]
) -> list[Step]:
    """Run the entry; return the rows of its metrics file."""
    recipe, metrics = folder / "recipe.yaml", folder / f"{method}.jsonl"
    sections = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    recipe.write_text(
        yaml.safe_dump({name: sections[name] for name in SECTIONS if name in sections})
    )
    block = SETTLING + options.steps
    steps = block * (2 * options.cycles + 1)
    vocabulary = teacher_size(str(teacher)).vocab_size
    program = [
        *(str(WORKER), method, str(block), "--config", str(recipe), "--mock-data"),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocabulary)),
        *("--micro-batch-size", str(options.micro_batch_size)),
        *("--global-batch-size", str(options.micro_batch_size * options.microbatches)),
        *("--train-iters", str(steps), "--eval-iters", "0", "--eval-interval", str(steps + 1)),
        *("--lr-decay-iters", "100000", "--let-stop-step", "100000"),
        *("--let-metrics-path", str(metrics), *flags),
    ]
    run_entry(program, 1, TEACHER=str(teacher))
    return [*load_metrics(metrics).steps.values()]


# Figures


def blocks(steps: list[Step], counted: int) -> list[Block]:
    """Split a run into the counted steps of each block; blocks with odd index had a teacher."""
    length = SETTLING + counted
    if len(steps) % (2 * length) != length:
        raise ValueError(f"{len(steps)} steps are not an odd number of blocks of {length}")
    return [steps[start + SETTLING : start + length] for start in range(0, len(steps), length)]


def step_ratios(taken: list[Block]) -> list[float]:
    """Return, per block with a teacher, its median step over the mean of its neighbours'."""
    medians = [statistics.median(step["step_seconds"] for step in block) for block in taken]
    return [
        middle / ((before + after) / 2)
        for before, middle, after in zip(medians[:-1:2], medians[1::2], medians[2::2], strict=True)
    ]


def peak(block: Block) -> int:
    """Return the peak bytes of the block's largest step."""
    return max(step["max_memory_bytes"] for step in block)


def figures(taken: list[Block], baseline_peak: int | None) -> dict[str, Any]:
    """Return one row of the results; `baseline_peak` is in bytes before the teacher was loaded."""
    low, middle, high = statistics.quantiles(step_ratios(taken), n=4, method="inclusive")
    baseline = [step["step_seconds"] for block in taken[::2] for step in block]
    row: dict[str, Any] = {
        "step_ratio": round(middle, 4),
        "step_ratio_q25": round(low, 4),
        "step_ratio_q75": round(high, 4),
        "baseline_seconds": round(statistics.median(baseline), 4),
        "peak_ratio": None,
        "peak_ratio_after": None,
        "baseline_peak_gib": None,
        "cycles": len(taken) // 2,
        "steps": len(taken[0]),
    }
    if baseline_peak is not None:
        row["peak_ratio"] = round(max(map(peak, taken[1::2])) / baseline_peak, 4)
        row["peak_ratio_after"] = round(max(map(peak, taken[2::2])) / baseline_peak, 4)
        row["baseline_peak_gib"] = round(baseline_peak / 2**30, 3)
    return row


def _print(rows: list[dict[str, Any]]) -> None:
    table = [("method", *FIGURES)]
    for row in rows:
        values = ("not measured" if row[name] is None else f"{row[name]:.4f}" for name in FIGURES)
        table.append((row["method"], *values))
    print_table(None, table, 120)


if __name__ == "__main__":
    sys.exit(main())
