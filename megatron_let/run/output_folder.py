"""The identity of a run, stored in its output folder so that no other run overwrites it."""

import argparse
import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from megatron_let.config.arguments import flag
from megatron_let.config.hybrid_pattern import without_stages
from megatron_let.config.let_config import METHODS, LETConfig
from megatron_let.errors import LETError
from megatron_let.files.atomic import write_json
from megatron_let.files.names import RUN, TRACKER
from megatron_let.run.resume import resumed_step
from megatron_let.teacher.hub import parse_hub_id, resolve_commit, snapshot_id
from megatron_let.teacher.weight_files import weight_files

_METRICS = "let_metrics_path"
_SETTINGS = "settings"
# {hub id as given: `owner/name@commit` that the run uses}
_HUB_IDS = "let_hub_ids"
# Where and how the teacher runs changes no number.
_HOW = ("let_placement", "let_max_prefetch", "let_teacher_compile")
_NOT_IDENTITY = (_METRICS, _SETTINGS, _HUB_IDS, *_HOW)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_DIGESTED_BYTES = 2**20

# Settings that distinguish two runs; steps, batch size and layout may change on resume.
_IDENTITY = (
    "num_layers",
    "hybrid_layer_pattern",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "seq_length",
    "seed",
    "data_path",
    "train_data_path",
    "data_args_path",
    "per_split_data_args_path",
    "split",
    "reset_position_ids",
    "reset_attention_mask",
    "eod_mask_loss",
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
    "eval_iters",
    "eval_global_batch_size",
    "eval_micro_batch_size",
    "full_validation",
    "lr_decay_iters",
    "rampup_batch_size",
    "num_experts",
    "swiglu",
    "normalization",
    "position_embedding_type",
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)


def pin_hub_ids(args: argparse.Namespace) -> argparse.Namespace:
    """Replace the hub ids in `args` by `owner/name@commit`, and return `args`.

    A run that continues in `--save`, or from `--load`, keeps the commit that is stored there,
    unless the flag names another revision than at the first start.

    Raises:
        LETError: the hub has no such revision, or neither it nor the local cache can tell.
    """
    stored = _stored_identity(args)
    args.let_hub_ids = {}
    if args.let_teacher is not None and args.let_method not in (None, "none"):
        args.let_teacher = Path(_pin(args, str(args.let_teacher), stored))
    if args.tokenizer_model is not None and args.tokenizer_type == "HuggingFaceTokenizer":
        args.tokenizer_model = _pin(args, args.tokenizer_model, stored)
    return args


def resolve_teacher_dtype(args: argparse.Namespace) -> str | None:
    """Replace `--let-teacher-dtype auto` in `args` by a precision; return the choice in words.

    A run that continues in `--save`, or from `--load`, keeps the precision that is stored there.

    Returns:
        None if the precision was given, or the method has no teacher.
    """
    given = args.let_teacher_dtype not in (None, "auto")
    if given or METHODS[args.let_method or "none"].learns_from is None:
        return None
    # torch takes seconds to import, which readers of a run's settings need not wait for.
    from megatron_let.teacher import precision

    dtype, reason = precision.default_dtype()
    stored = _stored_identity(args).get("let_teacher_dtype")
    if stored is not None:
        dtype, reason = stored, "the run began with it"
    args.let_teacher_dtype = dtype
    return f"the teacher computes in {dtype}: {reason}"


def _stored_identity(args: argparse.Namespace) -> dict[str, Any]:
    folders = [Path(folder) for folder in (args.save, args.load) if folder]
    return next(filter(None, map(_read_identity, folders)), {})


def _pin(args: argparse.Namespace, given: str, stored: dict[str, Any]) -> str:
    hub_id = _hub_id(given)
    if hub_id is None:
        return given
    repository, revision = hub_id
    pinned = stored.get(_HUB_IDS, {}).get(f"{repository}@{revision}")
    if pinned is None and "@" not in given:
        values = [stored.get("let_teacher"), _tokenizer_id(stored.get("tokenizer_model"))]
        pinned = next((v for v in values if v and v.startswith(f"{repository}@")), None)
    pinned = pinned or f"{repository}@{resolve_commit(repository, revision)}"
    args.let_hub_ids[f"{repository}@{revision}"] = pinned
    return pinned


def _hub_id(model: str) -> tuple[str, str] | None:
    return None if Path(model).exists() else parse_hub_id(model)


def identity(args: argparse.Namespace, config: LETConfig) -> dict[str, Any]:
    """Return the settings that distinguish this run from another."""
    values: dict[str, Any] = {name: getattr(args, name, None) for name in _IDENTITY}
    values["hybrid_layer_pattern"] = without_stages(values["hybrid_layer_pattern"])
    values["tokenizer_model"] = _tokenizer_id(values["tokenizer_model"])
    for name in ("data_path", "train_data_path"):
        values[name] = values[name] and [data_id(item) for item in values[name]]
    for name in ("data_args_path", "per_split_data_args_path"):
        values[name] = values[name] and _data_list_id(Path(values[name]))
    if config.method == "none":
        return values | {"let_method": "none"}
    let = {f"let_{name}": value for name, value in dataclasses.asdict(config).items()}
    let = {name: value for name, value in let.items() if name not in _HOW}
    return values | let | {"let_teacher": teacher_id(str(config.teacher))}


def _data_list_id(file: Path) -> str:
    """Return a digest of a file that names data sets, with their content instead of their path."""
    words = re.split(r"([\s\"',]+)", file.read_text())
    return hashlib.sha256("".join(map(data_id, words)).encode()).hexdigest()[:16]


def data_id(item: str) -> str:
    """Return the name and digest of an indexed data set; a weight of a blend as it is."""
    tokens = Path(f"{item}.bin")
    return _content_id(Path(item).name, [tokens]) if tokens.is_file() else item


def _content_id(name: str, files: list[Path], ends: bool = False) -> str:
    """Return `NAME#DIGEST` of the sizes and first (with `ends` also last) MiB of the files."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest.update(f"{file.name} {size} ".encode())
            digest.update(stream.read(_DIGESTED_BYTES))
            if ends:
                stream.seek(max(0, size - _DIGESTED_BYTES))
                digest.update(stream.read())
    return f"{name}#{digest.hexdigest()[:12]}"


def teacher_id(teacher: str) -> str:
    """Return `owner/name@commit` of a snapshot from the hub, name and digest of another path.

    The name alone of a path that is gone: past --let-stop-step no teacher is needed.
    """
    if _hub_id(teacher):
        return snapshot_id(teacher) or teacher
    path = Path(os.path.abspath(teacher))
    files = [path] if path.is_file() else [path / "config.json", *weight_files(path)]
    found = [file for file in files if file.is_file()]
    # Two models trained from one may share the embedding, with which a file begins.
    return snapshot_id(teacher) or (_content_id(path.name, found, True) if found else path.name)


def _tokenizer_id(model: str | None) -> str | None:
    """Return `owner/name@commit` of a snapshot from the hub, name and digest of another path."""
    if model is None or not (os.path.isabs(model) or Path(model).exists()):
        return model
    path = Path(model).resolve()
    files = [path / name for name in _TOKENIZER_FILES] if path.is_dir() else [path]
    found = [file for file in files if file.is_file()]
    return snapshot_id(model) or (_content_id(path.name, found) if found else str(path))


def claim(args: argparse.Namespace, config: LETConfig) -> None:
    """Check that the output belongs to this run and store its identity; call it on one rank.

    Raises:
        LETError: the checkpoint folder or the metrics file holds another run, or the run would
            start over in its own folder.
    """
    metrics = args.let_metrics_path.resolve() if args.let_metrics_path else None
    if not args.save:
        _check_metrics(metrics, None, None)
        return
    save = Path(args.save)
    stored = _read_identity(save)
    hub_ids = getattr(args, _HUB_IDS, {})
    ours = identity(args, config) | ({_HUB_IDS: hub_ids} if hub_ids else {})
    if stored is not None and _has_begun(save, stored):
        _check_same(save, stored, ours)
    _check_not_started_over(save, args, known=stored is not None)
    if args.skip_train:
        return
    _check_metrics(metrics, save, stored)
    settings = {name: getattr(args, name, None) for name in _COMPARED}
    if stored is not None and metrics is not None and _not_empty(metrics):
        _record_changes(metrics, resumed_step(args), stored.get(_SETTINGS, {}), settings)
    save.mkdir(parents=True, exist_ok=True)
    place = metrics and os.path.relpath(metrics, save.resolve())
    write_json(save / RUN, ours | {_METRICS: place, _SETTINGS: settings})


def _record_changes(metrics: Path, step: int, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Append a row `changed` to the metrics file: {setting: [before, since this step]}."""
    new = json.loads(json.dumps(new))
    changed = {
        name: [old[name], new[name]] for name in new if old.get(name, new[name]) != new[name]
    }
    if changed:
        with metrics.open("a") as stream:
            stream.write(json.dumps({"iteration": step, "changed": changed}) + "\n")


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return a run's settings by name from its checkpoint folder; None if none are stored."""
    values = _read_identity(folder)
    if values is None:
        return None
    settings = values.get(_SETTINGS, {})
    return {name: value for name, value in values.items() if name not in _NOT_IDENTITY} | settings


def _read_identity(save: Path) -> dict[str, Any] | None:
    return json.loads((save / RUN).read_text()) if (save / RUN).is_file() else None


def _not_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _has_begun(save: Path, stored: dict[str, Any]) -> bool:
    """Return whether the stored run took a step; one without a step may be corrected."""
    metrics = stored[_METRICS]
    return (save / TRACKER).is_file() or (bool(metrics) and _not_empty(save.resolve() / metrics))


def _check_same(save: Path, stored: dict[str, Any], ours: dict[str, Any]) -> None:
    for name in sorted(stored.keys() - ours.keys() - set(_NOT_IDENTITY)):
        if stored[name]:
            print(
                f"megatron_let: the run in {save} was begun with {flag(name)} {stored[name]}, which"
                " this version does not have; it is ignored",
                flush=True,
            )
    for name in ours:
        if name not in _NOT_IDENTITY and not _is_same(name, stored, ours):
            raise LETError(
                f"The output folder {save} holds another run: {flag(name)} is {stored.get(name)}"
                f" there and {ours[name]} here; give another --save (and --load {save} to start"
                " from it)."
            )


def _is_same(name: str, stored: dict[str, Any], ours: dict[str, Any]) -> bool:
    if name not in stored and name.endswith("data_args_path"):
        return True  # older versions did not store it
    if name == "split" and name not in stored:
        return bool(stored.get(_SETTINGS, {}).get(name, ours[name]) == ours[name])
    if name not in stored:
        # An older version had no such flag, and did what its default does.
        default = getattr(LETConfig(), name.removeprefix("let_"), None)
        return ours[name] in (default, None, False)
    # False equals absent: a switch that one of two versions does not have is off there.
    theirs, here = stored.get(name) or None, ours.get(name) or None
    if name == "tokenizer_model" and theirs and here:
        # Older versions stored a path, or a hub id without its commit.
        pinned = ours.get(_HUB_IDS, {}).get(f"{theirs}@main")
        return here in (theirs, pinned, snapshot_id(theirs)) or _is_old_path(theirs, here)
    if name.endswith("data_path") and theirs and here:
        pairs = zip(theirs, here, strict=False)
        return len(theirs) == len(here) and all(a == b or _is_old_path(a, b) for a, b in pairs)
    if name == "let_teacher" and theirs and here and not ("#" in theirs and "#" in here):
        # Older versions stored no digest, and a teacher that is not needed may be gone.
        theirs, here = theirs.partition("#")[0], here.partition("#")[0]
    if name == "let_teacher" and theirs and here and "/" not in theirs:
        # Older versions stored the last part of a hub id only.
        given = [Path(i).name for i, pinned in ours.get(_HUB_IDS, {}).items() if pinned == here]
        names = [here, here.rpartition("@")[2], *given]
        return theirs in names or f"{theirs}@main" in names
    return bool(theirs == here)


def _is_old_path(stored: str, ours: str) -> bool:
    """Return whether an older version stored the path of what is now `NAME#DIGEST`."""
    return "#" in ours and "#" not in stored and Path(stored).name == ours.rpartition("#")[0]


def _check_not_started_over(save: Path, args: argparse.Namespace, known: bool) -> None:
    if not (save / TRACKER).is_file():
        loads_it = args.load is not None and Path(args.load).resolve() == save.resolve()
        if args.ckpt_step is None or args.finetune or not loads_it:
            _check_no_checkpoint(save)
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


def _check_no_checkpoint(save: Path) -> None:
    """Check that a folder without a tracker, as after a partial copy, has no whole checkpoint."""
    # The files that Megatron and DeepSpeed's engine write last.
    files = (
        file for name in ("metadata.json", "deepspeed.json") for file in save.glob(f"*/{name}")
    )
    found = sorted(m[1] for file in files if (m := re.fullmatch(r"iter_(\d+)", file.parent.name)))
    if found:
        raise LETError(
            f"The output folder {save} has iter_{found[-1]} but no {TRACKER}, without which the run"
            f" would start over; write {int(found[-1])} into that file to continue, or give another"
            " --save."
        )


def _check_metrics(path: Path | None, save: Path | None, stored: dict[str, Any] | None) -> None:
    if path is None:
        return
    _check_writable(path)
    own = save is not None and _is_its_metrics(path, save.resolve(), (stored or {}).get(_METRICS))
    if _not_empty(path) and not own:
        raise LETError(
            f"The metrics file {path} holds another run; give another --let-metrics-path or move"
            " it away."
        )


def _check_writable(path: Path) -> None:
    """Check, without creating anything, that the file can be written."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    writable = os.access(path if path.exists() else there, os.W_OK)
    if path.is_dir() or not there.is_dir() or not writable:
        raise LETError(
            f"--let-metrics-path {path} cannot be written; give a file in a folder of yours."
        )


def _is_its_metrics(path: Path, save: Path, stored: str | None) -> bool:
    """Return whether `path` is the metrics file that the run in `save` recorded."""
    if not stored:
        return False
    # Older versions stored an absolute path, which is wrong once the run's folder is moved.
    moved = os.path.isabs(stored) and save.parent == path.parent
    return moved or (save / stored).resolve() == path
