"""What an output folder holds, so that no run writes over another."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from megatron_let.config import LETConfig, LETError

FILE_NAME = "run.json"
_TRACKER = "latest_checkpointed_iteration.txt"

# What makes two runs different runs; steps, batch and layout may change on resume.
_IDENTITY = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "seq_length",
    "seed",
    "data_path",
    "train_data_path",
    "tokenizer_type",
    "tokenizer_model",
)


def identity(args: argparse.Namespace, config: LETConfig) -> dict[str, Any]:
    """The settings that tell one run from another."""
    values = {name: getattr(args, name, None) for name in _IDENTITY}
    if config.method == "none":
        return values | {"let_method": "none"}
    let = {f"let_{name}": value for name, value in dataclasses.asdict(config).items()}
    # By name, so that the teacher may move to another disk.
    return values | let | {"let_teacher": config.teacher.name if config.teacher else None}


def claim(args: argparse.Namespace, config: LETConfig) -> None:
    """Check that the output belongs to this run, and sign it; call it on one rank.

    Raises:
        LETError: the checkpoint folder or the metrics file holds another run, or one that would
            be started over.
    """
    save = Path(args.save) if args.save else None
    signature = save / FILE_NAME if save else None
    known = signature is not None and signature.is_file()
    if save is not None:
        if known:
            _check_same(save, identity(args, config))
        _check_not_started_over(save, args, known)
    _check_metrics(args.let_metrics_path, continues=known)
    if save is not None:
        _sign(save, identity(args, config))


def _check_same(save: Path, ours: dict[str, Any]) -> None:
    theirs = json.loads((save / FILE_NAME).read_text())
    for name in ours | theirs:
        if theirs.get(name) != ours.get(name):
            flag = "--" + name.replace("_", "-")
            raise LETError(
                f"The output folder {save} holds another run: {flag} is {theirs.get(name)} there"
                f" and {ours.get(name)} here; give another --save (and --load {save} to start"
                " from it)."
            )


def _check_not_started_over(save: Path, args: argparse.Namespace, known: bool) -> None:
    if not (save / _TRACKER).is_file():
        return
    loads_it = args.load is not None and Path(args.load).resolve() == save.resolve()
    if loads_it and not args.finetune:
        return
    iteration = (save / _TRACKER).read_text().strip()
    whose = "this run" if known else "another run"
    raise LETError(
        f"The output folder {save} holds {whose} at iteration {iteration}; add --load {save} to"
        " continue it, or give another --save."
    )


def _check_metrics(path: Path | None, continues: bool) -> None:
    if path is not None and not continues and path.is_file() and path.stat().st_size > 0:
        raise LETError(
            f"The metrics file {path} holds another run; give another --let-metrics-path or move"
            " it away."
        )


def _sign(save: Path, values: dict[str, Any]) -> None:
    save.mkdir(parents=True, exist_ok=True)
    partial = save / (FILE_NAME + ".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, save / FILE_NAME)
