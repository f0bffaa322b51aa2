"""What an output folder holds, so that no run writes over another."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError
from megatron_let.files.atomic import write_json
from megatron_let.files.names import RUN, TRACKER

_METRICS = "let_metrics_path"
_SETTINGS = "settings"

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

# What may change on resume, and yet makes two runs hard to compare.
_COMPARED = (
    "train_iters",
    "train_samples",
    "global_batch_size",
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_warmup_iters",
    "lr_warmup_fraction",
    "optimizer",
    "adam_beta1",
    "adam_beta2",
    "weight_decay",
    "clip_grad",
    "init_method_std",
    "attention_dropout",
    "hidden_dropout",
    "untie_embeddings_and_output_weights",
    "bf16",
    "fp16",
    "valid_data_path",
    "split",
    "eval_iters",
    "full_validation",
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
    metrics = args.let_metrics_path.resolve() if args.let_metrics_path else None
    theirs = _read_signature(save)
    if save is not None:
        if theirs is not None and _has_begun(save, theirs):
            _check_same(save, theirs, identity(args, config))
        _check_not_started_over(save, args, known=theirs is not None)
    _check_metrics(metrics, theirs)
    if save is not None:
        settings = {name: getattr(args, name, None) for name in _COMPARED}
        _sign(save, identity(args, config) | {_METRICS: str(metrics), _SETTINGS: settings})


def read_settings(folder: Path) -> dict[str, Any] | None:
    """All that a run's checkpoint folder says of its settings, by name; None for no run's."""
    values = _read_signature(folder)
    if values is None:
        return None
    values.pop(_METRICS, None)
    return values | values.pop(_SETTINGS, {})


def _read_signature(save: Path | None) -> dict[str, Any] | None:
    if save is None or not (save / RUN).is_file():
        return None
    values: dict[str, Any] = json.loads((save / RUN).read_text())
    return values


def _not_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _has_begun(save: Path, theirs: dict[str, Any]) -> bool:
    """Whether the signed run took a step; one that was refused after signing may be corrected."""
    return (save / TRACKER).is_file() or _not_empty(Path(theirs[_METRICS]))


def _check_same(save: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for name in ours | theirs:
        if name not in (_METRICS, _SETTINGS) and theirs.get(name) != ours.get(name):
            flag = "--" + name.replace("_", "-")
            raise LETError(
                f"The output folder {save} holds another run: {flag} is {theirs.get(name)} there"
                f" and {ours.get(name)} here; give another --save (and --load {save} to start"
                " from it)."
            )


def _check_not_started_over(save: Path, args: argparse.Namespace, known: bool) -> None:
    if not (save / TRACKER).is_file():
        return
    loads_it = args.load is not None and Path(args.load).resolve() == save.resolve()
    if loads_it and not args.finetune:
        return
    iteration = (save / TRACKER).read_text().strip()
    whose = "this run" if known else "another run"
    raise LETError(
        f"The output folder {save} holds {whose} at iteration {iteration}; add --load {save} to"
        " continue it, or give another --save."
    )


def _check_metrics(path: Path | None, theirs: dict[str, Any] | None) -> None:
    continues = theirs is not None and theirs[_METRICS] == str(path)
    if path is not None and not continues and _not_empty(path):
        raise LETError(
            f"The metrics file {path} holds another run; give another --let-metrics-path or move"
            " it away."
        )


def _sign(save: Path, values: dict[str, Any]) -> None:
    save.mkdir(parents=True, exist_ok=True)
    write_json(save / RUN, values)
