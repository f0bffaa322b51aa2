"""Train the variants of a sweep on this machine, and compare them on one page.

    DATA=runs/quickstart/data python tools/sweep.py configs/sweep_methods.yaml --output runs/methods

An interrupted sweep continues where it stopped: finished runs are kept, an unfinished one resumes
from its checkpoint. Flags after `--` are given to every run.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from megatron_let.cli.common import (
    check_output,
    command_line,
    output_console,
    positive,
    run_command,
    say,
)
from megatron_let.cli.compare import report
from megatron_let.cli.local_run import (
    LOG,
    ROOT,
    Trainer,
    export,
    interruptible,
    plain,
    run_environment,
)
from megatron_let.config.arguments import flag
from megatron_let.config.recipes import find_recipe
from megatron_let.errors import LETError
from megatron_let.files.names import METRICS
from megatron_let.metrics.compare import ComparedRun, load_run
from megatron_let.metrics.sweep import (
    Sweep,
    SweepRun,
    load_sweep,
    runs_of,
    sbatch_line,
    teacher_runs,
)

# Settings that determine the text of the evaluation.
_HELD_OUT = ("seq-length", "valid-data-path", "split", "full-validation", "tokenizer-model")


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; return the exit code: 1 if a run failed, 2 if the sweep could not begin."""
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    given, more = _parser().parse_args(argv[:split]), argv[split + 1 :]
    with interruptible():
        return run_command(
            "sweep",
            lambda console: _sweep(given, more, console),
            f"interrupted; continue with: {command_line()}",
        )


def _sweep(given: argparse.Namespace, more: list[str], errors: Console) -> int:
    sweep = load_sweep(given.sweep)
    _replace_recipes(sweep, given.recipe)
    _check(given)
    output = given.output.resolve()
    teachers = {name: output / "teachers" / name for name in sweep.teachers}
    models = {name: folder / "model" for name, folder in teachers.items()}
    runs = runs_of(sweep, given.seeds, more, models)
    if given.sbatch:
        _check_trained(models)
        for run in runs:
            print(sbatch_line(run, ROOT / "launch", output.name))
        return 0
    folders = {output / run.variant / f"seed-{run.seed}": run for run in runs}
    environment = _environment(given.jobs * given.nproc_per_node)
    console = output_console()
    say(
        console,
        f"{len(teachers)} teachers and {len(runs)} runs, {given.jobs} at a time; logs:"
        f" {output}/*/*/{LOG}",
    )
    trainer = Trainer(environment, console, given.jobs, given.nproc_per_node, given.verbose)
    of_teachers = {teachers[name]: run for name, run in teacher_runs(sweep).items()}
    _check_same_text(sweep, of_teachers.values(), runs)
    trainer.check(of_teachers | folders)
    failed = trainer.train(of_teachers)
    for message in failed.values():
        raise LETError(message)
    for name, folder in teachers.items():
        export(folder, models[name], folder / LOG, console if given.verbose else None)
    failed = trainer.train(folders)
    found = [
        load_run(run.variant, folder)
        for folder, run in folders.items()
        if (folder / METRICS).is_file()
    ]
    if any(run.name == sweep.baseline for run in found):
        report(found, sweep.baseline, output / "comparison", sweep.title, command_line())
        _report_gains(sweep, found, teachers, output / "comparison", console)
    for name, message in failed.items():
        say(errors, f"sweep: error: {name}: {message}", "red")
    return 1 if failed else 0


def _replace_recipes(sweep: Sweep, given: list[str]) -> None:
    for text in given:
        name, _, file = text.partition("=")
        if name not in sweep.recipes:
            names = ", ".join(sweep.recipes)
            raise LETError(f"--recipe has {text!r}; give NAME=FILE with a NAME of {names}.")
        sweep.recipes[name] = find_recipe(Path(file))


def _check(given: argparse.Namespace) -> None:
    if len(set(given.seeds)) < len(given.seeds):
        raise LETError(f"--seeds is {' '.join(map(str, given.seeds))}; give each seed once.")
    for name in ("jobs", "nproc_per_node"):
        if given.sbatch and getattr(given, name) > 1:
            raise LETError(
                f"{flag(name)} {getattr(given, name)} has no effect with --sbatch, whose jobs have"
                " the size of their scripts; leave it out."
            )
    check_output(given.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="-- FLAGS are given to every variant, not to the sweep's teachers",
    )
    add = parser.add_argument
    add("sweep", type=Path, help="one of configs/sweep_*.yaml, or its name")
    add("--output", type=Path, default=Path("runs/sweep"), help="default: runs/sweep")
    add("--seeds", type=positive, nargs="+", default=[], help="default: the sweep's")
    add(
        "--nproc-per-node", type=positive, default=1, metavar="N", help="ranks per run (default: 1)"
    )
    add("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default: 1)")
    add("--verbose", action="store_true", help="show the runs' output too")
    add(
        "--recipe",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="recipes that replace the sweep's",
    )
    add("--sbatch", action="store_true", help="print the commands that submit the runs, and exit")
    return parser


def _report_gains(
    sweep: Sweep,
    runs: list[ComparedRun],
    teachers: Mapping[str, Path],
    out: Path,
    console: Console,
) -> None:
    """Write what each method gains with each of the sweep's teachers."""
    from megatron_let.metrics import teacher_gap
    from megatron_let.metrics.provenance import provenance, write_csv

    losses = {}
    baselines = [run for run in runs if run.name == sweep.baseline]
    for name, folder in teachers.items():
        loss = load_run(name, folder).metrics.final_valid_loss
        assert loss is not None, "a teacher is trained to an evaluation after its last step"
        losses[name] = loss
    having = [(run, sweep.variants[run.name].get("teacher")) for run in runs]
    taught = [(sweep.method(run.name), teacher, run) for run, teacher in having if teacher]
    gains = teacher_gap.gains(taught, losses, baselines)
    if not gains:
        return
    write_csv(out / "gains.csv", teacher_gap.rows(gains), provenance(command_line()))
    teacher_gap.plot(out / "gains.png", gains)
    for method in dict.fromkeys(gain.method for gain in gains):
        say(console, f"- {method}: {teacher_gap.describe(teacher_gap.crossover(gains, method))}")
    say(console, f"written: {out / 'gains.csv'}, {out / 'gains.png'}")


def _check_same_text(sweep: Sweep, teachers: Iterable[SweepRun], runs: Sequence[SweepRun]) -> None:
    """Check that the teachers and the baseline are evaluated on the same text.

    Raises:
        LETError: names the teacher and the first setting that differs.
    """
    baseline = next(run for run in runs if run.variant == sweep.baseline)
    for teacher in teachers:
        for name in _HELD_OUT:
            theirs, ours = (plain(run.settings.get(name)) for run in (teacher, baseline))
            if theirs != ours:
                raise LETError(
                    f"The gains cannot be compared: {name} of the {teacher.variant} is {theirs},"
                    f" and {ours} of the students; set it in the sweep's entry of that teacher too."
                )


def _check_trained(teachers: Mapping[str, Path]) -> None:
    for name, folder in teachers.items():
        if not (folder / "config.json").is_file():
            raise LETError(
                f"The teacher {name} is not trained, {folder} does not exist; run the sweep without"
                " --sbatch first."
            )


def _environment(processes: int) -> dict[str, str]:
    """Return the environment of the runs.

    The default teacher is the one that the quickstart trained beside its data, else the packaged.
    """
    if not os.environ.get("DATA"):
        raise LETError(
            "The environment variable DATA is not set; export the data of the recipes, such as"
            " runs/quickstart/data, which launch/quickstart.sh makes."
        )
    from megatron_let.teacher.inspect import inspect_teacher
    from megatron_let.teacher.package import packaged_teacher

    data = Path(os.environ["DATA"]).resolve()
    teacher = os.environ.get("TEACHER") or data.with_name("teacher")
    if not Path(teacher).exists() and not os.environ.get("TEACHER"):
        teacher = packaged_teacher()
    return run_environment(data, inspect_teacher(Path(teacher)).path, processes)
