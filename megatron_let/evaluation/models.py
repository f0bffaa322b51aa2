"""Find the checkpoints of a run, identify them, and load them as transformers models."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_let.checkpoint.architecture import to_hugging_face
from megatron_let.checkpoint.formats import is_checkpoint, is_complete, iteration_folder
from megatron_let.checkpoint.parameter_mapping import parameter_mappings
from megatron_let.checkpoint.torch_dist import INDEX
from megatron_let.checkpoint.weights import MegatronWeights, Weights
from megatron_let.files.names import DONE

_ITERATION = re.compile(r"iter_\d{7,}")


def load_model(weights: Weights, dtype: torch.dtype | None, device: str) -> Any:
    """Load a model; a Megatron checkpoint is converted in memory.

    Args:
        weights: checkpoint from `open_weights`.
        dtype: precision of the model; None keeps the checkpoint's.
        device: device to load it on.
    """
    from transformers import AutoModelForCausalLM

    dtype = dtype or weights.dtype
    if not isinstance(weights, MegatronWeights):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            weights.folder, dtype=dtype, local_files_only=True
        )
        return loaded.to(device)
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    settings = to_hugging_face(weights.llama, str(dtype).removeprefix("torch."))
    with no_init_weights():
        model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    # The constructor does not tie weights that it does not initialise.
    model.tie_weights()
    model = model.to(dtype)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for mapping in parameter_mappings(weights.llama):
            for name in mapping.names:
                parameters.pop(name).copy_(weights.read(name))
    assert not parameters, f"not in the checkpoint: {sorted(parameters)}"
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
    files = [folder / "config.json", *folder.glob("*.safetensors")]
    if is_checkpoint(folder):
        files = list(folder.rglob("*.pt"))
    for file in sorted(files):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def finished_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints in the folder of a run, oldest first."""
    whole = [p for p in run.iterdir() if _ITERATION.fullmatch(p.name) and is_complete(p)]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("iter_")))


def new_checkpoints(run: Path, interval_seconds: float) -> Iterator[list[Path]]:
    """Yield all complete checkpoints each time there are new ones, until the run is done."""
    seen: list[Path] = []
    while True:
        # Read before the checkpoints, so that the last one is not missed.
        done = (run / DONE).is_file()
        found = finished_checkpoints(run)
        if found != seen:
            seen = found
            yield found
        elif not done:
            time.sleep(interval_seconds)
        if done:
            return
