"""Students of the local layers against transformers' models with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_let.checkpoint.reference_models import _megatron_on_cpu
from megatron_let.compat.local_hybrid import local_hybrid_spec
from megatron_let.compat.local_layers import local_layer_spec

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_experts_per_tok": 2,
    "norm_topk_prob": True, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 0.7,
    "mscale_all_dim": 1.3, "original_max_position_embeddings": 4096,
}  # fmt: skip
COMMON: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4,
    "normalization": "RMSNorm", "layernorm_epsilon": 1e-5, "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu, "add_bias_linear": False,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "use_cpu_initialization": True,
    "persist_layer_norm": False, "bias_dropout_fusion": False, "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False, "apply_rope_fusion": False, "transformer_impl": "local",
    "qk_layernorm": True, "num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "alltoall",
}  # fmt: skip
LATENT: dict[str, Any] = {
    "multi_latent_attention": True, "kv_lora_rank": 16, "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8, "v_head_dim": 12, "moe_layer_freq": [0, 1, 1],
    "moe_shared_expert_intermediate_size": 48, "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True, "moe_router_num_groups": 2, "moe_router_group_topk": 1,
    "moe_router_topk_scaling_factor": 2.5,
}  # fmt: skip


def deepseek(q_lora_rank: int | None, rope: dict[str, Any] | None) -> torch.nn.Module:
    config = DeepseekV3Config(
        **SIZES, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=4,
        routed_scaling_factor=2.5, kv_lora_rank=16, q_lora_rank=q_lora_rank, qk_rope_head_dim=8,
        v_head_dim=12, qk_nope_head_dim=16, n_group=2, topk_group=1, first_k_dense_replace=1,
        rope_parameters=rope,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def qwen() -> torch.nn.Module:
    config = Qwen3MoeConfig(**SIZES, num_key_value_heads=2, head_dim=16, num_experts=4)
    return Qwen3MoeForCausalLM(config)


# Name in transformers -> name in Megatron, within a layer.
SAME = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "self_attn.o_proj": "self_attention.linear_proj",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
    "self_attn.q_proj": "self_attention.linear_q_proj",
    "self_attn.q_a_proj": "self_attention.linear_q_down_proj",
    "self_attn.q_a_layernorm": "self_attention.q_layernorm",
    "self_attn.q_b_proj": "self_attention.linear_q_up_proj",
    "self_attn.kv_a_proj_with_mqa": "self_attention.linear_kv_down_proj",
    "self_attn.kv_a_layernorm": "self_attention.kv_layernorm",
    "self_attn.kv_b_proj": "self_attention.linear_kv_up_proj",
    "mlp.gate": "mlp.router",
    "mlp.down_proj": "mlp.linear_fc2",
    "mlp.shared_experts.down_proj": "mlp.shared_experts.linear_fc2",
}


def megatron_state(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Return transformers' weights under the names of the local layers."""
    found = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"],
        "output_layer.weight": state["lm_head.weight"],
    }
    for index in range(num_layers):
        prefix = f"model.layers.{index}."
        layer = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        found |= {f"decoder.layers.{index}.{n}": t for n, t in megatron_layer(layer).items()}
    return found


def megatron_layer(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {
        f"{ours}.weight": layer[f"{theirs}.weight"]
        for theirs, ours in SAME.items()
        if f"{theirs}.weight" in layer
    }
    if "self_attn.k_proj.weight" in layer:
        query, key, value = (layer[f"self_attn.{n}_proj.weight"] for n in "qkv")
        groups = (part.view(2, -1, 64) for part in (query, key, value))
        found["self_attention.linear_qkv.weight"] = torch.cat(tuple(groups), 1).view(-1, 64)
        del found["self_attention.linear_q_proj.weight"]
    for mlp in ("mlp", "mlp.shared_experts"):
        if f"{mlp}.gate_proj.weight" in layer:
            pair = [layer[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up")]
            found[f"{mlp}.linear_fc1.weight"] = torch.cat(pair)
    for expert in range(4 if "mlp.experts.down_proj" in layer else 0):
        name = f"mlp.experts.local_experts.{expert}"
        found[f"{name}.linear_fc1.weight"] = layer["mlp.experts.gate_up_proj"][expert]
        found[f"{name}.linear_fc2.weight"] = layer["mlp.experts.down_proj"][expert]
    if "mlp.gate.e_score_correction_bias" in layer:
        found["mlp.router.expert_bias"] = layer["mlp.gate.e_score_correction_bias"]
    return found


CASES: dict[str, tuple[Callable[[], torch.nn.Module], TransformerConfig]] = {
    "experts with q and k norms": (
        qwen,
        lambda: TransformerConfig(**COMMON, num_query_groups=2, kv_channels=16),
    ),
    "latent attention, groups, shared expert": (
        lambda: deepseek(24, None),
        lambda: MLATransformerConfig(**COMMON, **LATENT, q_lora_rank=24, rope_type="rope"),
    ),
    "yarn": (
        lambda: deepseek(24, YARN),
        lambda: MLATransformerConfig(
            **COMMON, **LATENT, q_lora_rank=24, rope_type="yarn", rotary_scaling_factor=4.0,
            mscale=0.7, mscale_all_dim=1.3,
        ),
    ),
    "queries are not compressed": (
        lambda: deepseek(None, None),
        lambda: MLATransformerConfig(**COMMON, **LATENT, q_lora_rank=None, rope_type="rope"),
    ),
}  # fmt: skip


def build(config: TransformerConfig) -> GPTModel:
    return GPTModel(
        config,
        local_layer_spec(SimpleNamespace(transformer=config)),  # type: ignore[arg-type]
        vocab_size=256,
        max_sequence_length=64,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    ).eval()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.no_grad()
def test_loss_equals_transformers(case: tuple[Any, Any]) -> None:
    make, configure = case
    torch.manual_seed(0)
    theirs = make().eval()
    for tensor in theirs.state_dict().values():
        # Norms of ones, or a bias of zeros, would hide a wrong mapping.
        tensor.add_(torch.randn_like(tensor) * (0.2 if tensor.dim() == 1 else 0.1))
    tokens = torch.randint(0, 256, (2, 64))
    with _megatron_on_cpu():
        ours = build(configure())
        state = megatron_state(theirs.state_dict(), 3)
        missing, unexpected = ours.load_state_dict(state, strict=False)
        assert not unexpected and not [name for name in missing if "_extra" not in name]
        losses = ours(tokens, torch.arange(64)[None], None, labels=tokens.roll(-1, 1))
    expected = torch.nn.functional.cross_entropy(
        theirs(tokens).logits.flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="none"
    )
    torch.testing.assert_close(losses.flatten(), expected, rtol=1e-5, atol=1e-5)


EXPERTS: dict[str, Callable[[TransformerConfig], Any]] = {
    "GPTModel": lambda config: local_layer_spec(
        SimpleNamespace(transformer=config)  # type: ignore[arg-type]
    ).layer_specs[0],
    "HybridModel": lambda config: local_hybrid_spec(config).submodules.moe_layer,
}


@pytest.mark.parametrize("layer", EXPERTS.values(), ids=EXPERTS)
def test_experts_of_two_ranks_start_as_those_of_one_process(
    layer: Callable[[TransformerConfig], Any],
) -> None:
    config = TransformerConfig(**COMMON)

    def weights(rank: int, local: int) -> list[Tensor]:
        """Return the initial weights, and the next number of the random sequence."""
        groups = ProcessGroupCollection()
        groups.ep = SimpleNamespace(rank=lambda: rank)  # type: ignore[assignment]
        groups.expt_tp = parallel_state.get_expert_tensor_parallel_group()
        groups.expt_dp = None  # type: ignore[assignment]
        torch.manual_seed(1)
        build_experts = layer(config).submodules.mlp.keywords["submodules"].experts
        experts = build_experts(local, config, pg_collection=groups)
        assert experts.num_local_experts == len(experts.local_experts) == local
        return [*experts.parameters(), torch.rand(1)]

    with _megatron_on_cpu():
        *one, after = weights(0, 4)
        *first, after_first = weights(0, 2)
        *second, after_second = weights(1, 2)
    assert not torch.equal(first[0], second[0])
    torch.testing.assert_close(first + second, one, rtol=0, atol=0)
    assert after == after_first == after_second


GROUPED = COMMON | {"num_query_groups": 2, "kv_channels": 16}


@torch.no_grad()
def test_l2_norm_of_q_and_k_is_rms_norm_without_weights() -> None:
    tokens = torch.randint(0, 256, (2, 64))
    with _megatron_on_cpu():
        plain = build(TransformerConfig(**GROUPED | {"qk_layernorm": False, "qk_l2_norm": True}))
        normed = build(TransformerConfig(**GROUPED))
        _, unexpected = normed.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected
        logits = [model(tokens, torch.arange(64)[None], None) for model in (plain, normed)]
    torch.testing.assert_close(*logits)


@torch.no_grad()
def test_gate_of_zeros_halves_the_attention() -> None:
    tokens = torch.randint(0, 256, (2, 64))
    with _megatron_on_cpu():
        plain = build(TransformerConfig(**GROUPED))
        gated = build(TransformerConfig(**GROUPED, attention_output_gate=True))
        state = plain.state_dict()
        for name in [name for name in state if name.endswith("linear_qkv.weight")]:
            # Per group: two heads of queries, then their gates, then key and value.
            queries, rest = state[name].view(2, 64, 64).split([32, 32], 1)
            state[name] = torch.cat([queries, torch.zeros_like(queries), rest], 1).view(-1, 64)
        gated.load_state_dict(state)
        for layer in plain.decoder.layers:
            layer.self_attention.linear_proj.weight.mul_(0.5)
        logits = [model(tokens, torch.arange(64)[None], None) for model in (plain, gated)]
    torch.testing.assert_close(*logits)
