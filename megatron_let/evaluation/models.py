"""Load a checkpoint of either format as a transformers model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from megatron_let.checkpoint.architecture import to_hugging_face
from megatron_let.checkpoint.formats import iteration_folder
from megatron_let.checkpoint.parameter_mapping import parameter_mappings
from megatron_let.checkpoint.torch_dist import INDEX
from megatron_let.checkpoint.weights import MegatronWeights, Weights
from megatron_let.errors import LETError


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


def load_tokenizer(weights: Weights) -> Any:
    """Load the tokenizer of a checkpoint.

    Raises:
        LETError: the checkpoint names no tokenizer.
    """
    from transformers import AutoTokenizer

    if weights.tokenizer is None:
        raise LETError(f"{weights.folder} names no tokenizer; give --tokenizer DIR.")
    return AutoTokenizer.from_pretrained(weights.tokenizer, local_files_only=True)


def checkpoint_hash(path: Path) -> str:
    """Return a hash that identifies the weights of a checkpoint, wherever it is stored.

    For a Megatron checkpoint it covers the index, which is unique per save, and the file sizes;
    for a Hugging Face folder it covers the content.
    """
    folder = iteration_folder(path)
    digest = hashlib.sha256()
    if (folder / INDEX).is_file():
        digest.update((folder / INDEX).read_bytes())
        sizes = sorted((f.name, f.stat().st_size) for f in folder.glob("*.distcp"))
        digest.update(repr(sizes).encode())
        return digest.hexdigest()[:16]
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def tokens_seen(weights: Weights) -> int | None:
    """Return the tokens that a Megatron run had trained on, or None if unknown."""
    if not isinstance(weights, MegatronWeights):
        return None
    samples, length = (weights.args.get(n) for n in ("consumed_train_samples", "seq_length"))
    return int(samples) * int(length) if samples and length else None
