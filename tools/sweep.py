"""A list of variants trained in turn on this machine, and then compared on one page.

    DATA=runs/quickstart/data python tools/sweep.py configs/sweep_methods.yaml --output runs/methods

A sweep that was stopped goes on where it stopped: finished runs are left as they are, an
unfinished one resumes from its checkpoint. What stands behind `--` is given to every run.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from compare_runs import report
from rich.console import Console

from megatron_let.cli.local_run import train_locally
from megatron_let.config.recipes import RecipeError
from megatron_let.errors import LETError
from megatron_let.metrics.compare import load_run
from megatron_let.metrics.sweep import Sweep, SweepRun, load_sweep, runs_of, sbatch_line

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; return the exit code: 1 if a run failed, 2 if it could not begin."""
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    given = _parser().parse_args(argv[:split])
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        sweep = load_sweep(given.sweep, ROOT)
        for text in given.recipe:
            name, _, file = text.partition("=")
            sweep.recipes[name] = Path(file)
        runs = runs_of(sweep, given.seeds, argv[split + 1 :])
        if given.sbatch:
            for run in runs:
                print(sbatch_line(run, ROOT / "launch"))
            return 0
        failed = _train_all(runs, given, console)
        _compare(sweep, runs, given.output.resolve())
    except (LETError, RecipeError) as error:
        print(f"sweep: error: {error}", file=sys.stderr)
        return 2
    for name, message in failed.items():
        print(f"sweep: error: {name}: {message}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="-- FLAGS are given to every run"
    )
    add = parser.add_argument
    add("sweep", type=Path, help="one of configs/sweep_*.yaml")
    add("--output", type=Path, default=Path("runs/sweep"), help="default: runs/sweep")
    add("--seeds", type=int, nargs="+", default=[], help="default: the sweep's")
    add("--nproc-per-node", type=int, default=1, metavar="N", help="ranks of a run (default: 1)")
    add("--recipe", nargs="+", default=[], metavar="NAME=FILE", help="instead of the sweep's")
    add("--sbatch", action="store_true", help="print what submits the runs, and start nothing")
    return parser


def _train_all(runs: list[SweepRun], given: argparse.Namespace, console: Console) -> dict[str, str]:
    """Train each run that is not done; return the messages of those that failed."""
    environment = _environment()
    failed = {}
    for number, run in enumerate(runs, start=1):
        console.print(f"[{number}/{len(runs)}] {run.name}", markup=False)
        output = _folder(given.output.resolve(), run)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(given.nproc_per_node),
            "-m", "megatron_let.pretrain", "--config", str(run.recipe),
            "--let-metrics-path", str(output / "metrics.jsonl"), *run.flags,
        ]  # fmt: skip
        try:
            train_locally(
                run.variant, command, {**environment, "OUTPUT": str(output)}, output,
                run.num_steps, console,
            )  # fmt: skip
        except LETError as error:
            # The others are still worth their time.
            failed[run.name] = str(error)
            console.print(f"      {error}", style="red", markup=False)
    return failed


def _folder(output: Path, run: SweepRun) -> Path:
    return output / run.variant / f"seed-{run.seed}"


def _environment() -> dict[str, str]:
    """The variables of the recipes; the teacher is the packaged one unless there is another."""
    if not os.environ.get("DATA"):
        raise LETError(
            "The environment variable DATA is not set; export the data of the recipes, such as"
            " runs/quickstart/data, which launch/quickstart.sh makes."
        )
    teacher = os.environ.get("TEACHER")
    if not teacher:
        from megatron_let.teacher.inspect import inspect_teacher
        from megatron_let.teacher.package import packaged_teacher

        teacher = str(inspect_teacher(packaged_teacher()).path)
    data = str(Path(os.environ["DATA"]).resolve())
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    # All files are local by now; transformers must not look for a network.
    return {**threads, **os.environ, "DATA": data, "TEACHER": teacher, "HF_HUB_OFFLINE": "1"}


def _compare(sweep: Sweep, runs: list[SweepRun], output: Path) -> None:
    found = [
        load_run(run.variant, _folder(output, run))
        for run in runs
        if (_folder(output, run) / "metrics.jsonl").is_file()
    ]
    if any(run.name == sweep.baseline for run in found):
        report(found, sweep.baseline, output / "comparison", sweep.title)


if __name__ == "__main__":
    sys.exit(main())
