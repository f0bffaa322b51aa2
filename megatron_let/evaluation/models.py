"""Find the checkpoints of a run, identify them, and load them as transformers models."""

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from megatron_let.checkpoint.formats import is_checkpoint, is_complete, iteration_folder
from megatron_let.checkpoint.model_types import to_hugging_face
from megatron_let.checkpoint.parameter_mapping import parameter_mappings
from megatron_let.checkpoint.torch_dist import INDEX
from megatron_let.checkpoint.weights import (
    MegatronWeights,
    check_tokenizer_size,
    open_weights,
    tokenizer_in,
)
from megatron_let.errors import LETError
from megatron_let.files.names import DONE
from megatron_let.teacher.inspect import inspect_teacher
from megatron_let.teacher.model import from_pretrained
from megatron_let.teacher.weight_files import check_all_loaded, weight_files

_ITERATION = re.compile(r"iter_\d{7,}")


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder with a causal language model of any architecture.

    Attributes:
        tokenizer: folder or file of the tokenizer; None if unknown.
        dtype: type of the weights in its config; None if it states none.
    """

    folder: Path
    tokenizer: Path | None
    dtype: torch.dtype | None


Model = ModelFolder | MegatronWeights


def open_model(path: Path, tokenizer: Path | None = None) -> Model:
    """Open a checkpoint, a run's folder (its last one) or a Hugging Face folder; reads no weight.

    Args:
        tokenizer: folder or file, instead of the one that the checkpoint names.

    Raises:
        LETError: not a model, not complete, or not one that transformers loads.
    """
    if not path.exists():
        raise LETError(f"The model {path} does not exist.")
    if path.is_dir() and is_checkpoint(iteration_folder(path)):
        weights = open_weights(path, tokenizer)
        assert isinstance(weights, MegatronWeights)
        return weights
    if path.is_dir() and not (path / "config.json").is_file():
        raise LETError(
            f"The folder {path} is neither a Megatron checkpoint nor a Hugging Face model (no"
            " config.json)."
        )
    folder = inspect_teacher(path)
    own = tokenizer or tokenizer_in(folder.path)
    if own is not None:
        check_tokenizer_size(own, folder.vocab_size)
    return ModelFolder(folder.path, own, folder.dtype)


def load_model(weights: Model, dtype: torch.dtype | None, device: str) -> Any:
    """Load a model of `open_model`; a Megatron checkpoint is converted in memory.

    Args:
        dtype: precision of the model; None keeps that of the weights.

    Raises:
        LETError: transformers cannot load the folder, or not all of its weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(weights, ModelFolder):
        loaded, report = from_pretrained(weights.folder, dtype, AutoModelForCausalLM)
        check_all_loaded(weights.folder, report)
        return loaded.eval().to(device)
    dtype = dtype or weights.dtype
    settings = to_hugging_face(weights.architecture, str(dtype).removeprefix("torch."))
    config = AutoConfig.for_model(**settings)
    # transformers stacks the experts of a layer, which the checkpoint and its folders have apart.
    state = {
        name: weights.read(name).to(dtype)
        for mapping in parameter_mappings(weights.architecture)
        for name in mapping.names
    }
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        trust_remote_code=False,
    )
    check_all_loaded(weights.folder, report)
    return model.eval().to(device)


def checkpoint_hash(path: Path) -> str:
    """Return a hash that identifies the weights of a checkpoint, wherever it is stored.

    For a torch_dist checkpoint it covers the index, which is unique per save, and the file sizes;
    for a Hugging Face folder and other formats it covers the content.
    """
    folder = iteration_folder(path)
    digest = hashlib.sha256()
    if (folder / INDEX).is_file():
        digest.update((folder / INDEX).read_bytes())
        sizes = sorted((f.name, f.stat().st_size) for f in folder.glob("*.distcp"))
        digest.update(repr(sizes).encode())
        return digest.hexdigest()[:16]
    if is_checkpoint(folder):
        files = list(folder.rglob("*.pt"))
    else:
        files = [folder / "config.json", *weight_files(folder)]
    for file in sorted(files):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def check_run_folder(path: Path) -> None:
    """Check that `path` is the checkpoint folder of a run, which may have no checkpoint yet.

    Raises:
        LETError: another kind of folder; names the one to give.
    """
    wanted = "give the checkpoint folder of a run that has started"
    if not path.is_dir():
        raise LETError(f"The folder {path} does not exist; {wanted}.")
    if (path / "config.json").is_file():
        raise LETError(f"The folder {path} is a Hugging Face model, not a run; {wanted}.")
    if is_checkpoint(path):
        raise LETError(f"The folder {path} is a single checkpoint; give its run, {path.parent}.")
    if (path / "checkpoints").is_dir():
        raise LETError(
            f"The folder {path} is a run's output; give its checkpoints, {path / 'checkpoints'}."
        )


def finished_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints in the folder of a run, oldest first."""
    whole = [p for p in run.iterdir() if _ITERATION.fullmatch(p.name) and is_complete(p)]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("iter_")))


def new_checkpoints(run: Path, interval_seconds: float) -> Iterator[list[Path]]:
    """Yield all complete checkpoints each time there are new ones, until the run is done.

    Raises:
        LETError: the run is done and has no complete checkpoint.
    """
    seen: list[Path] = []
    while True:
        # Read before the checkpoints, so that the last one is not missed.
        done = (run / DONE).is_file()
        found = finished_checkpoints(run)
        if found and found != seen:
            seen = found
            yield found
        elif not done:
            time.sleep(interval_seconds)
        if done:
            break
    if not seen:
        raise LETError(
            f"The run {run} is done ({DONE}) and has no complete checkpoint; give the folder that"
            " has its iter_* folders."
        )
