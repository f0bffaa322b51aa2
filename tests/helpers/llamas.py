"""Small architectures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_let.checkpoint.architecture import Architecture

LLAMA = Architecture(
    num_layers=2, hidden_size=24, ffn_hidden_size=20, num_heads=6, num_kv_heads=3, head_dim=4,
    vocab_size=40, max_positions=64, tied=False, norm_epsilon=1e-5,
)  # fmt: skip
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_ffn_hidden_size": 12,
           "aux_loss_coeff": 0.25}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_kv_heads": 6},
    "mqa": {"num_kv_heads": 1},
    "tied": {"tied": True},
    "wide heads": {"head_dim": 8},
    "odd ffn": {"ffn_hidden_size": 5461},
    "llama3 rope": {"rotary_base": 500000.0, "rope_type": "llama3", "rope_factor": 32.0},
    "linear rope": {"rope_type": "linear", "rope_factor": 4.0},
    "epsilon": {"norm_epsilon": 1e-6},
    "qwen2": {"qkv_bias": True, "head_dim": 8},
    "qwen3": {"qk_norm": True, "head_dim": 8, "tied": True},
    "mixtral": EXPERTS | {"ffn_hidden_size": 12, "rotary_base": 1000000.0},
    "qwen2_moe": EXPERTS | {"qkv_bias": True, "shared_ffn_hidden_size": 16},
    "qwen3_moe": EXPERTS | {"qk_norm": True, "head_dim": 8},
    "qwen3_moe, dense layers, not normalised": EXPERTS
    | {"qk_norm": True, "dense_layers": (1,), "normalized_routing": False},
}


def variant(name: str) -> Architecture:
    """Return the architecture with the changes of `VARIANTS[name]`."""
    return replace(LLAMA, **VARIANTS[name])
