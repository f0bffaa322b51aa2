"""Measure the curvature of the alignment loss by depth, and of the whole loss (appendix I).

    python tools/curvature.py RUN --layers 1 3 5 --teacher DIR --data-path PREFIX --output DIR

A MODEL is a Megatron checkpoint, a run (its last checkpoint) or a Hugging Face folder.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from megatron_let.cli.common import (
    check_output,
    command_line,
    device_of,
    print_table,
    run_command,
    say,
)
from megatron_let.errors import LETError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_let.theory.curvature import Curvature
    from megatron_let.theory.hessian import Interval

_INTERVALS = ("squared_norm", "change", "added", "eigenvalue")


def main(argv: list[str] | None = None) -> int:
    """Measure the models; return the exit code."""
    given = _parser().parse_args(argv)
    return run_command("curvature", lambda console: _run(given, console))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL", help="checkpoint, run or folder")
    add("--layers", nargs="+", type=int, required=True, metavar="K", help="aligned layers, from 1")
    add("--teacher", required=True, metavar="MODEL", help="folder, .gguf file or hub id")
    add("--data-path", type=Path, required=True, metavar="PREFIX", help="indexed data")
    add("--output", type=Path, required=True, metavar="DIR", help="curvature.csv and curvature.png")
    add("--weight", type=float, default=0.1, metavar="W", help="lambda of the whole loss (0.1)")
    add("--samples", type=int, default=2, metavar="B", help="windows of the data (2)")
    add("--seq-length", type=int, default=64, metavar="S", help="tokens per window (64)")
    add("--probes", type=int, default=20, metavar="N", help="probes of the norm, at least 2 (20)")
    add("--starts", type=int, default=2, metavar="N", help="starts of Lanczos' method (2)")
    add("--device", help="default: cuda where there is a GPU, else cpu")
    return parser


def _run(given: argparse.Namespace, console: Console) -> int:
    from megatron_let.metrics.provenance import provenance, write_csv

    check_output(given.output)
    if given.probes < 2 or given.starts < 1 or given.samples < 1 or given.seq_length < 1:
        raise LETError("Give at least 2 --probes, and 1 of --starts, --samples and --seq-length.")
    if not 0 <= given.weight < math.inf:
        raise LETError(f"--weight is {given.weight}; give a finite number of at least 0.")
    table, picture = given.output / "curvature.csv", given.output / "curvature.png"
    found: dict[str, list[Curvature]] = {}
    for model in given.models:
        found[str(model)] = _measure(given, model, console)
        print_table(f"{model}: Hessian, 95 % intervals", _table_rows(found[str(model)]))
        # After each model, so that an interrupted command keeps those that are done.
        flat = [{"model": name, **_csv_row(row)} for name, rows in found.items() for row in rows]
        write_csv(table, flat, provenance(command_line()))
        _plot(picture, found)
    say(console, f"written: {table}, {picture}")
    return 0


def _measure(given: argparse.Namespace, path: Path, console: Console) -> list[Curvature]:
    import torch

    from megatron_let.config.let_config import LETConfig
    from megatron_let.evaluation.models import load_model, open_model
    from megatron_let.teacher.inspect import inspect_teacher
    from megatron_let.teacher.model import load_teacher
    from megatron_let.theory.curvature import Probes, measure
    from megatron_let.theory.model_losses import model_losses

    device = device_of(given.device)
    model = load_model(open_model(path), torch.float32, str(device))
    folder = inspect_teacher(given.teacher)
    vocab_size = min(folder.vocab_size, model.config.get_text_config(decoder=True).vocab_size)
    tokens = _tokens(given, vocab_size).to(device)
    settings = LETConfig(teacher_dtype="fp32", teacher_compile=False)
    state = load_teacher(folder, settings, device).hidden_state(tokens[:, :-1])
    losses = model_losses(model, state, tokens, given.layers)
    with console.status(str(path)) as status:
        probes = Probes(given.probes, given.starts)
        return measure(losses, given.weight, probes, lambda t: status.update(f"{path}: {t}"))


def _tokens(given: argparse.Namespace, vocab_size: int) -> Tensor:
    """Return the first windows of the data, `[b, s + 1]`.

    Raises:
        LETError: the data is too short, or has tokens that one of the models does not have.
    """
    from itertools import islice

    import numpy as np
    import torch

    from megatron_let.evaluation.perplexity import windows

    rows = list(islice(windows(given.data_path, given.seq_length, None), given.samples))
    if len(rows) < given.samples or len(rows[-1]) <= given.seq_length:
        raise LETError(
            f"The data {given.data_path} has fewer than {given.samples} windows of"
            f" {given.seq_length + 1} tokens; give fewer --samples or a smaller --seq-length."
        )
    tokens = torch.from_numpy(np.stack(rows))
    if int(tokens.max()) >= vocab_size:
        raise LETError(
            f"The data {given.data_path} has token {int(tokens.max())} but the smaller vocabulary"
            f" of model and teacher has {vocab_size}; give data of their tokenizer."
        )
    return tokens


def _bounds(interval: Interval | None) -> str:
    return "–" if interval is None else "{:.4g} ({:.4g} to {:.4g})".format(*interval)


def _table_rows(rows: list[Curvature]) -> Iterator[tuple[Any, ...]]:
    yield "loss", "layer", "squared norm", "change", "added to nll", "eigenvalue", "not 0"
    for row in rows:
        bounds = (_bounds(getattr(row, name)) for name in _INTERVALS)
        not_0 = "–" if row.nonzero_after is None else row.nonzero_after
        yield row.loss, row.layer or "–", *bounds, not_0


def _csv_row(row: Curvature) -> dict[str, Any]:
    values: dict[str, Any] = {"loss": row.loss, "layer": row.layer}
    for name in _INTERVALS:
        interval: Interval | None = getattr(row, name)
        value, low, high = (None, None, None) if interval is None else interval
        values |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return values | {"nonzero_after": row.nonzero_after}


def _plot(path: Path, found: dict[str, list[Curvature]]) -> None:
    """Plot the alignment loss's norm and eigenvalue, and what the whole loss adds, against k."""
    from matplotlib.figure import Figure

    from megatron_let.files.atomic import atomic_file

    panels = (
        ("alignment", "squared_norm", "alignment loss: squared Frobenius norm", "log"),
        ("alignment", "eigenvalue", "alignment loss: largest eigenvalue", "log"),
        ("total", "added", "whole loss: squared norm added, % of nll", "linear"),
    )
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, (loss, name, title, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        for model, (nll, *rows) in found.items():
            unit = nll.squared_norm.value / 100 if name == "added" else 1.0
            points = [(row.layer, getattr(row, name)) for row in rows if row.loss == loss]
            values = [interval.value / unit for _, interval in points]
            error = [
                [(interval.value - interval.low) / unit for _, interval in points],
                [(interval.high - interval.value) / unit for _, interval in points],
            ]
            ks = [k for k, _ in points]
            axes.errorbar(ks, values, yerr=error, marker="o", capsize=3, label=model)
        axes.set(title=title, xlabel="aligned layer k", yscale=scale)
        axes.set_xticks(ks)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")
