"""Step time by placement of the teacher, in real pipelines, against the simulation.

    python tools/benchmark/placement.py [--stages 2] [--emulate] [--cycles 8]

One run of the entry cycles through the variants step by step: no teacher, `aligned-stage`,
`spread`, `bubble` (whose first step, with no states computed ahead, is not counted). A ratio
compares steps of the same cycle. The teacher costs 8.25 % of the student's training FLOPs, as a
1.7B teacher of a 7B student does. The simulation uses the costs that the run measured.

With `--emulate` every pass sleeps for its cost in addition to the tiny student's work, so that more
stages than cores overlap; the schedule, the transfers and the teacher's calls are real. Without it
use at least one core (or, with NCCL, one GPU) per stage.
"""

import argparse
import csv
import functools
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS_FOLDER, ROOT, run_entry, save_teacher, source

from megatron_let.cli.common import print_table
from megatron_let.files.names import METRICS
from megatron_let.metrics.provenance import write_csv
from megatron_let.metrics.read import load_metrics
from megatron_let.planner.sizes import TransformerSize

RESULTS = RESULTS_FOLDER / "placement.csv"
CYCLE = ("baseline", "aligned-stage", "spread", "first bubble", "bubble")
# Steps before the first cycle; the scheduler measures in the second one.
WARMUP = 3
TEACHER_SHARE = 0.0825
# Width of the teacher's MLP, at which it takes that share of the computed passes.
TEACHER_FFN = 768
# Seconds that an emulated forward pass sleeps; a backward takes two.
EMULATED_FORWARD = 0.05
COSTS = re.compile(r"stages forward (\S+), backward (\S+), teacher (\S+)\)")
VOCAB = 256


def main() -> int:
    """Run, compare, print and write the CSV; with --worker, act as one rank of the run."""
    if len(sys.argv) > 1 and sys.argv[1] == "--worker":
        return _worker(sys.argv[2:])
    options = _parse()
    rows = []
    for stages in options.stages:
        with tempfile.TemporaryDirectory() as name:
            log, steps = _train(Path(name), stages, options)
        rows += _rows(stages, log, steps, options)
    _print(rows)
    _write(rows)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--stages", type=int, nargs="+", default=[2])
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--cycles", type=int, default=8, help="measured cycles of the variants")
    parser.add_argument("--emulate", action="store_true", help="passes sleep for their cost")
    return parser.parse_args()


# One rank of the run


def _worker(argv: list[str]) -> int:
    """Run the entry and cycle through the variants."""
    from megatron_let import pretrain
    from megatron_let.compat.device import detect_host, prepare_process

    prepare_process(detect_host(), int(os.environ["RANK"]))
    from megatron_let.methods.let import LETMethod

    if os.environ.get("EMULATE_STAGES"):
        _emulate(int(os.environ["EMULATE_STAGES"]))
    LETMethod.run = _in_turn(LETMethod.run)  # type: ignore[method-assign]
    return pretrain.main(argv)


def _in_turn(original: Any) -> Any:
    @functools.wraps(original)
    def run(self: Any, forward_backward: Any, **kwargs: Any) -> Any:
        step = self._run.current_step()
        if os.environ.get("EMULATE_STAGES"):
            kwargs["forward_step_func"] = _slow(kwargs["forward_step_func"], EMULATED_FORWARD)
        if step < WARMUP:
            return original(self, forward_backward, **kwargs)
        variant = CYCLE[(step - WARMUP) % len(CYCLE)]
        if variant != "bubble":
            self._context.states.forget_ahead()
        if variant == "baseline":
            return forward_backward(**kwargs)
        self._context.scheduler.placement = variant.removeprefix("first ")
        return original(self, forward_backward, **kwargs)

    return run


def _emulate(stages: int) -> None:
    """Make backward passes and the teacher sleep; `_in_turn` slows the forward passes."""
    from megatron.core.pipeline_parallel import schedules

    from megatron_let.teacher.model import Teacher

    schedules.backward_step = _slow(schedules.backward_step, 2 * EMULATED_FORWARD)
    teacher = TEACHER_SHARE * 3 * stages * EMULATED_FORWARD
    Teacher.hidden_state = _slow(Teacher.hidden_state, teacher)  # type: ignore[method-assign]


def _slow(work: Any, seconds: float) -> Any:
    @functools.wraps(work)
    def slowed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return work(*args, **kwargs)

    return slowed


# The run


def _train(
    folder: Path, stages: int, options: argparse.Namespace
) -> tuple[str, list[dict[str, Any]]]:
    """Run the entry; return its log and the rows of its metrics file."""
    ffn = 48 if options.emulate else TEACHER_FFN
    teacher = save_teacher(
        folder / "teacher", TransformerSize(2, 192, ffn, 4, 4, 48, True, VOCAB), 512
    )
    steps = WARMUP + len(CYCLE) * options.cycles
    size, seq_length = ((64, 64), 64) if options.emulate else ((192, 512), 256)
    program = [
        __file__, "--worker",
        "--config", str(ROOT / "configs" / "tiny.yaml"), "--mock-data",
        "--pipeline-model-parallel-size", str(stages), "--num-layers", str(4 * stages),
        "--hidden-size", str(size[0]), "--ffn-hidden-size", str(size[1]),
        "--seq-length", str(seq_length), "--max-position-embeddings", str(seq_length),
        "--micro-batch-size", "1", "--global-batch-size", str(options.microbatches),
        "--train-iters", str(steps), "--eval-iters", "0", "--let-stop-step", str(10 * steps),
        "--let-layer", "3", "--let-placement", "bubble",
        "--let-metrics-path", str(folder / METRICS),
    ]  # fmt: skip
    log = run_entry(
        program, stages, OMP_NUM_THREADS="1", TEACHER=str(teacher),
        EMULATE_STAGES=str(stages) if options.emulate else "",
    )  # fmt: skip
    return log, [*load_metrics(folder / METRICS).steps.values()]


# Figures


def _rows(
    stages: int, log: str, steps: list[dict[str, Any]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    from megatron_let.placement.pipeline import Pipeline
    from megatron_let.placement.plan import FIXED_PLACEMENTS, step_time_ratio
    from megatron_let.placement.program import AlignedLayer
    from megatron_let.placement.simulate import Costs

    measured = COSTS.search(log)
    assert measured is not None, "the run did not report its costs"
    forward, backward = (tuple(map(float, text.split("/"))) for text in measured.groups()[:2])
    costs = Costs(forward, backward, float(measured[3]))
    seconds: dict[str, list[float]] = {name: [] for name in CYCLE}
    for step in steps:
        index = step["iteration"] - 1 - WARMUP
        if index >= 0:
            seconds[CYCLE[index % len(CYCLE)]].append(step["step_seconds"])
    pipeline = Pipeline(stages, options.microbatches)
    rows = []
    for name in FIXED_PLACEMENTS:
        ratios = [a / b for a, b in zip(seconds[name], seconds["baseline"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        limit = options.microbatches
        simulated = step_time_ratio(name, pipeline, costs, AlignedLayer(0), limit)
        rows.append(
            {
                "stages": stages,
                "microbatches": options.microbatches,
                "passes": "emulated" if options.emulate else "computed",
                "placement": name,
                "ratio": round(middle, 4),
                "ratio_q25": round(low, 4),
                "ratio_q75": round(high, 4),
                "simulated": round(simulated, 4),
                "baseline_seconds": round(statistics.median(seconds["baseline"]), 4),
                "cycles": len(ratios),
                "teacher_over_forward": round(costs.teacher / statistics.mean(forward), 3),
                "backward_over_forward": round(sum(backward) / sum(forward), 3),
                **source(),
            }
        )
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    columns = [
        *("stages", "microbatches", "passes", "placement", "ratio", "ratio_q25", "ratio_q75"),
        *("simulated", "teacher_over_forward"),
    ]
    cells = ([row[column] for column in columns] for row in rows)
    print_table("step time over the baseline's", [columns, *cells], 120)


def _write(rows: list[dict[str, Any]]) -> None:
    """Write the CSV; rows replace older ones of the same stages, passes and placement."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in ("stages", "microbatches", "passes", "placement"))

    kept = {}
    if RESULTS.exists():
        with RESULTS.open(newline="") as stream:
            kept = {key(row): row for row in csv.DictReader(stream)}
    kept |= {key(row): row for row in rows}
    write_csv(RESULTS, [kept[name] for name in sorted(kept)], {})


if __name__ == "__main__":
    sys.exit(main())
