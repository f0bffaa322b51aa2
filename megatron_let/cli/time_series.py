"""Fine-tune a language model to classify time series, without and with LET (the paper's Table 2).

    python tools/time_series.py pretrain-teacher --output runs/time_series
    python tools/time_series.py train --output runs/time_series --student Qwen/Qwen2.5-0.5B
    python tools/time_series.py table --output runs/time_series

Without --data the sets are those in the package aeon, BasicMotions and JapaneseVowels. An
interrupted `train` continues: finished runs are kept.
"""

import argparse
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_let.cli.common import (
    add_command,
    check_output,
    command_line,
    device_of,
    output_console,
    print_table,
    run_command,
    say,
)
from megatron_let.errors import LETError
from megatron_let.metrics.provenance import provenance, write_csv

_TEACHER = "teacher.pt"


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; return the exit code."""
    given = _parser().parse_args(argv)
    return run_command(
        "time-series",
        lambda console: given.run(given, console),
        "interrupted; the same command continues, finished runs are kept",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    teacher = add_command(commands, "pretrain-teacher", _pretrain, "train TimesNet, the teacher")
    train = add_command(commands, "train", _train, "fine-tune the student, without and with LET")
    table = add_command(commands, "table", _table, "show Table 2; write a CSV file and a plot")
    for command in (teacher, train, table):
        command.add_argument(
            "--output",
            type=Path,
            default=Path("runs/time_series"),
            help="default: runs/time_series",
        )
    for command in (teacher, train):
        add = command.add_argument
        add("--config", type=Path, default=Path("time_series"), help="default: time_series")
        add("--data", type=Path, metavar="DIR", help="folder of NAME/NAME_TRAIN.ts, NAME_TEST.ts")
        add("--sets", nargs="+", metavar="NAME", help="default: those of --config that are there")
    add("--student", help="model folder, .gguf file or hub id (default: the packaged SmolLM2-135M)")
    add("--teacher", type=Path, help=f"default: {_TEACHER} in --output")
    add("--seeds", type=int, nargs="+", help="default: those of --config")
    return parser


def _names(given: argparse.Namespace, wanted: Sequence[str], console: Console) -> list[str]:
    """Return the names of `--sets`, else of those of the settings that are at hand."""
    from megatron_let.timeseries.series import PACKAGED

    if given.data is not None and not given.data.is_dir():
        raise LETError(f"The folder {given.data} of --data does not exist.")
    if given.sets:
        return list(dict.fromkeys(given.sets))
    found = [n for n in wanted if n in PACKAGED or (given.data and (given.data / n).is_dir())]
    if missing := [name for name in wanted if name not in found]:
        say(console, f"not at hand, left out: {', '.join(missing)}", "yellow")
    if not found:
        raise LETError("None of the data sets of --config is at hand; give a folder with --data.")
    return list(dict.fromkeys(found))


def _pretrain(given: argparse.Namespace, console: Console) -> int:
    from megatron_let.timeseries.series import load_data_set
    from megatron_let.timeseries.settings import load_settings
    from megatron_let.timeseries.training import accuracy, save_teacher, train_teacher

    check_output(given.output)
    settings = load_settings(given.config)["teacher"]
    names = _names(given, settings["sets"], console)
    sets = [load_data_set(name, given.data) for name in names]
    device, out = device_of(), output_console()

    def report(epoch: int, loss: float) -> None:
        say(out, f"teacher: epoch {epoch}/{settings['epochs']}, loss {loss:.4f}")

    model = train_teacher(sets, settings, device, report)
    given.output.mkdir(parents=True, exist_ok=True)
    save_teacher(given.output / _TEACHER, model, settings)
    for data in sets:
        correct = accuracy(partial(model, name=data.name), data.test, device)
        say(out, f"{data.name}: test accuracy {100 * correct:.1f} %")
    say(out, f"written: {given.output / _TEACHER}")
    return 0


def _train(given: argparse.Namespace, console: Console) -> int:
    from megatron_let.teacher.package import packaged_teacher
    from megatron_let.timeseries.classifier import inspect_student
    from megatron_let.timeseries.outcomes import METHODS, is_finished, save_run
    from megatron_let.timeseries.series import data_set_hash, load_data_set
    from megatron_let.timeseries.settings import load_settings
    from megatron_let.timeseries.training import fine_tune, load_teacher

    check_output(given.output)
    settings, device = load_settings(given.config)["student"], device_of()
    names = _names(given, settings["sets"], console)
    file = given.teacher or given.output / _TEACHER
    teachers = {"baseline": None, "let": load_teacher(file, device)}
    student = given.student or str(packaged_teacher())
    sets = [load_data_set(name, given.data) for name in names]
    longest = max(data.train.mask.shape[1] for data in sets)
    folder = inspect_student(student, settings["layer"], longest)
    out, student_hash = output_console(), _student_hash(student, folder.path)
    seeds = dict.fromkeys(given.seeds or settings["seeds"])
    for data in sets:
        data_hash = data_set_hash(data.name, given.data)
        for seed, method in itertools.product(seeds, METHODS):
            run = {"data_set": data.name, "method": method, "seed": seed}
            name = " ".join(map(str, run.values()))
            run |= {"student": Path(student).name, "settings": _determining(settings, method, file)}
            run |= {"student_hash": student_hash, "data_hash": data_hash}
            if is_finished(given.output, run):
                say(out, f"{name}: finished before")
                continue
            epochs = []
            for epoch in fine_tune(folder, data, teachers[method], seed, settings, device):
                epochs.append(epoch)
                say(out, f"{name}: epoch {len(epochs)}/{settings['epochs']}, {_text(epoch)}")
            save_run(given.output, run, epochs, provenance(command_line()))
    return 0


def _determining(settings: Mapping[str, Any], method: str, teacher: Path) -> str:
    """Return what determines the numbers of a run besides its data set, seed and student."""
    values = {key: value for key, value in settings.items() if key not in ("sets", "seeds")}
    if method == "let":
        values["teacher"] = _file_hash(teacher)
    return " ".join(f"{key}={value}" for key, value in values.items())


def _student_hash(student: str, folder: Path) -> str:
    """Return a hash of a student's weights, which are in `folder`."""
    from megatron_let.evaluation.models import checkpoint_hash

    # What a .gguf file is converted to depends on the version of transformers.
    return _file_hash(Path(student)) if Path(student).is_file() else checkpoint_hash(folder)


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _text(epoch: Mapping[str, Any]) -> str:
    cosine = "" if epoch["cosine"] is None else f"cosine {epoch['cosine']:.3f}, "
    return f"loss {epoch['loss']:.4f}, {cosine}test accuracy {100 * epoch['test_accuracy']:.1f} %"


def _table(given: argparse.Namespace, console: Console) -> int:
    from megatron_let.timeseries.outcomes import load_runs, plot, table_rows

    runs = load_runs(given.output)
    if not runs:
        raise LETError(f"{given.output} has no finished run; start `train` with this --output.")
    students = ", ".join(sorted({run[0]["student"] for run in runs}))
    title = f"test accuracy in %, mean (range over seeds), of {students}"
    print_table(title, table_rows(runs))
    files = [given.output / name for name in ("time_series.csv", "time_series.png")]
    rows = [row for run in runs for row in run]
    # Runs of an earlier version have fewer columns.
    columns = dict.fromkeys((name for row in rows for name in row), "")
    write_csv(files[0], [columns | row for row in rows], {})
    plot(files[1], runs)
    say(console, f"written: {', '.join(map(str, files))}")
    return 0
