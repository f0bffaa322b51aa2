"""Small models as Hugging Face folders and as Megatron checkpoints."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_let.checkpoint.convert import to_megatron_checkpoint
from megatron_let.checkpoint.formats import iteration_folder, open_checkpoint
from megatron_let.checkpoint.weights import open_weights
from megatron_let.engines.deepspeed.checkpoint_info import CheckpointInfo, write_info
from tests.helpers.text_data import save_hugging_face_tokenizer


def save_llama(folder: Path, shard_bytes: int | None = None, **changes: Any) -> Path:
    """Save a random Llama in which every tensor changes the output."""
    return save_model("llama", folder, shard_bytes, **changes)


# Model type -> the settings of a small model.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 48, "head_dim": 32},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80, "norm_topk_prob": True,
    },
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "norm_topk_prob": True, "head_dim": 32,
    },
}  # fmt: skip


def save_model(kind: str, folder: Path, shard_bytes: int | None = None, **changes: Any) -> Path:
    """Save a random model of a type in which every tensor changes the output."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 250, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **(sizes | MODELS[kind] | changes))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms of ones, or weights and biases near 0, would hide a misplaced tensor.
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.3))
            parameter.add_(1.0 if name.endswith("norm.weight") else 0.0)
            # Far from equal, so that no expert is chosen by rounding.
            parameter.mul_(10.0 if name.endswith("mlp.gate.weight") else 1.0)
    sharded = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    model.save_pretrained(folder, **sharded)
    return folder


def with_tokenizer(folder: Path, vocab_size: int = 600) -> Path:
    """Add a trained tokenizer to a model's folder."""
    shutil.copytree(_tokenizer(vocab_size), folder, dirs_exist_ok=True)
    return folder


@functools.cache
def _tokenizer(vocab_size: int) -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return save_hugging_face_tokenizer(folder, vocab_size)


def as_megatron(source: Path, output: Path, rename: Callable[[str], str] = str) -> Path:
    """Convert a model, and rename Megatron's tensors."""
    from megatron_let.checkpoint import convert

    original = convert.Shard

    def renamed(name: str, *rest: Any) -> Any:
        return original(rename(name), *rest)

    convert.Shard = renamed  # type: ignore[assignment, misc]
    try:
        to_megatron_checkpoint(open_weights(source), output)
    finally:
        convert.Shard = original  # type: ignore[misc]
    return output


def as_deepspeed(source: Path, output: Path, scale: float = 1.0) -> Path:
    """Write a Megatron checkpoint as one of DeepSpeed's ZeRO-1 engine, without DeepSpeed."""
    checkpoint = open_checkpoint(iteration_folder(source))
    module = {}
    for name, like in checkpoint.tensors().items():
        if not name.startswith("decoder.layers."):
            module[name] = checkpoint.read(name) * scale
            continue
        for layer in range(len(like)):
            single = name.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)
            module[single] = checkpoint.read(name, (layer,)) * scale
    output.mkdir(exist_ok=True)
    write_info(output, CheckpointInfo(10, 1, 1, 1))
    state = {"module": module, "args": checkpoint.state["args"]}
    torch.save(state, output / "mp_rank_00_model_states.pt")
    return output


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return a Hugging Face folder's state dict, loaded by transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).state_dict()


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Return whether two state dicts are equal bit by bit."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
        for name in ours
    )
