"""Small random teachers in the format of a user's folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

VOCAB_SIZE = 256
MAX_POSITIONS = 128
NUM_LAYERS = 3


def random_model(architecture: str, width: int = 48) -> PreTrainedModel:
    """Return a random `llama`, `opt`, `gpt_neox` or `gpt2` of three layers with 4 heads."""
    torch.manual_seed(0)
    common = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": MAX_POSITIONS}
    sizes = {"num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "hidden_size": width}
    if architecture == "llama":
        return LlamaForCausalLM(
            LlamaConfig(**common, **sizes, intermediate_size=2 * width, num_key_value_heads=2)
        )
    if architecture == "opt":
        return OPTForCausalLM(
            OPTConfig(**common, **sizes, ffn_dim=2 * width, word_embed_proj_dim=width)
        )
    if architecture == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**common, **sizes, intermediate_size=2 * width))
    if architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB_SIZE,
                n_positions=MAX_POSITIONS,
                n_layer=NUM_LAYERS,
                n_head=4,
                n_embd=width,
            )
        )
    raise ValueError(f"no random model of {architecture}")


def save_teacher(folder: Path, architecture: str = "llama", width: int = 48) -> Path:
    """Save a random model whose states depend on the token and whose final norm is not 1."""
    model = random_model(architecture, width)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                # A norm whose weights are all 1 does not change a cosine.
                parameter.add_(torch.rand_like(parameter) - 0.5)
    model.save_pretrained(folder)
    return folder
