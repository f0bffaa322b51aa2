"""The identity of a run, stored in its output folder so that no other run overwrites it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_let.config.arguments import flag
from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError
from megatron_let.files.atomic import write_json
from megatron_let.files.names import RUN, TRACKER

_METRICS = "let_metrics_path"
_SETTINGS = "settings"

# Settings that distinguish two runs; steps, batch size and layout may change on resume.
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

# Settings that may change on resume; a comparison of two runs reports their differences.
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
    """Return the settings that distinguish this run from another."""
    values = {name: getattr(args, name, None) for name in _IDENTITY}
    if config.method == "none":
        return values | {"let_method": "none"}
    let = {f"let_{name}": value for name, value in dataclasses.asdict(config).items()}
    # The name alone, so that the teacher may move to another disk.
    return values | let | {"let_teacher": config.teacher.name if config.teacher else None}


def claim(args: argparse.Namespace, config: LETConfig) -> None:
    """Check that the output belongs to this run and store its identity; call it on one rank.

    Raises:
        LETError: the checkpoint folder or the metrics file holds another run, or the run would
            start over in its own folder.
    """
    save = Path(args.save) if args.save else None
    metrics = args.let_metrics_path.resolve() if args.let_metrics_path else None
    stored = _read_identity(save)
    ours = identity(args, config)
    if save is not None:
        if stored is not None and _has_begun(save, stored):
            _check_same(save, stored, ours)
        _check_not_started_over(save, args, known=stored is not None)
    _check_metrics(metrics, stored)
    if save is not None:
        settings = {name: getattr(args, name, None) for name in _COMPARED}
        save.mkdir(parents=True, exist_ok=True)
        write_json(save / RUN, ours | {_METRICS: str(metrics), _SETTINGS: settings})


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return a run's settings by name from its checkpoint folder; None if none are stored."""
    values = _read_identity(folder)
    if values is None:
        return None
    values.pop(_METRICS, None)
    return values | values.pop(_SETTINGS, {})


def _read_identity(save: Path | None) -> dict[str, Any] | None:
    if save is None or not (save / RUN).is_file():
        return None
    values: dict[str, Any] = json.loads((save / RUN).read_text())
    return values


def _not_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _has_begun(save: Path, stored: dict[str, Any]) -> bool:
    """Return whether the stored run took a step; one without a step may be corrected."""
    return (save / TRACKER).is_file() or _not_empty(Path(stored[_METRICS]))


def _check_same(save: Path, stored: dict[str, Any], ours: dict[str, Any]) -> None:
    for name in ours | stored:
        if name in (_METRICS, _SETTINGS):
            continue
        # False equals absent: a switch that one of two versions does not have is off there.
        if (stored.get(name) or None) != (ours.get(name) or None):
            raise LETError(
                f"The output folder {save} holds another run: {flag(name)} is {stored.get(name)}"
                f" there and {ours.get(name)} here; give another --save (and --load {save} to start"
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


def _check_metrics(path: Path | None, stored: dict[str, Any] | None) -> None:
    continues = stored is not None and stored[_METRICS] == str(path)
    if path is not None and not continues and _not_empty(path):
        raise LETError(
            f"The metrics file {path} holds another run; give another --let-metrics-path or move"
            " it away."
        )
