"""A Llama's architecture in Hugging Face's config and in Megatron's arguments."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_let.checkpoint.architecture import (
    Architecture,
    from_megatron,
    ignored_rope_factor,
    recipe_settings,
    to_megatron,
)
from megatron_let.checkpoint.load_check import ARCHITECTURE_ARGUMENTS, first_difference
from megatron_let.checkpoint.model_types import from_hugging_face, to_hugging_face
from megatron_let.config.arguments import padded_vocab_size
from megatron_let.errors import LETError
from tests.helpers.llamas import LLAMA, VARIANTS, variant


def arguments(architecture: Architecture, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**to_megatron(replace(architecture, **changes)))


@pytest.mark.parametrize("name", VARIANTS)
def test_config_round_trips_through_both_formats(name: str) -> None:
    llama = variant(name)
    assert from_hugging_face(to_hugging_face(llama, "bfloat16")) == llama
    assert from_megatron(to_megatron(llama), llama.vocab_size) == llama
    # As transformers of this version writes it.
    theirs = AutoConfig.for_model(**to_hugging_face(llama, "float32")).to_dict()
    assert from_hugging_face(theirs) == llama


@pytest.mark.parametrize(
    ("vocab_size", "divisible_by", "tensor_parallel", "rows"),
    [(49152, 128, 1, 49152), (50257, 128, 1, 50304), (50257, 128, 2, 50432), (32000, 128, 8, 32768),
     (100, 1, 1, 100)],
)  # fmt: skip
def test_vocabulary_is_padded_to_a_multiple(
    vocab_size: int, divisible_by: int, tensor_parallel: int, rows: int
) -> None:
    assert padded_vocab_size(vocab_size, divisible_by, tensor_parallel) == rows


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "opt"}, "'opt'"),
        ({"model_type": "gemma3_text"}, "'gemma3_text'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0,
                           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
         "low_freq_factor"),
        # Outside of rope_scaling it has precedence when the model is built.
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
          "original_max_position_embeddings": 131072}, "original_max_position_embeddings"),
        ({"is_causal": False}, "is_causal"),
        ({"rope_theta": 10000.5}, "10000.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
    ],
)  # fmt: skip
def test_unsupported_llama_is_refused(change: dict[str, Any], words: str) -> None:
    config = to_hugging_face(LLAMA, "float32") | change
    with pytest.raises(LETError, match=words):
        from_hugging_face(config)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
         "sliding_attention"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0,
                                    "original_max_position_embeddings": 32}}, "yarn"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "RoPE"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "mlp_only_layers"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
        ("mixtral", {"sliding_window": 8}, "sliding_window"),
        # These ignore layer_types.
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8,
                       "layer_types": ["full_attention"] * 2}, "sliding_window"),
        ("mixtral", {"sliding_window": 8, "layer_types": ["full_attention"] * 2},
         "sliding_window"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
    ],
)  # fmt: skip
def test_unsupported_setting_of_an_architecture_is_refused(
    kind: str, change: dict[str, Any], words: str
) -> None:
    config = to_hugging_face(variant(kind), "float32")
    from_hugging_face(config)
    with pytest.raises(LETError, match=words):
        from_hugging_face(config | change)


# What hub folders have (Qwen/Qwen3-30B-A3B, mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen2.5-0.5B).
HUB_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": (
        {"attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu",
         "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
         "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
         "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
         "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
         "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
         "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
         "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
         "vocab_size": 151936},
        {"num_experts": 128, "experts_per_token": 8, "head_dim": 128, "rotary_base": 1e6,
         "expert_ffn_hidden_size": 768, "dense_layers": (), "normalized_routing": True},
    ),
    "mixtral": (
        {"attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096,
         "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
         "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
         "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
         "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
         "vocab_size": 32000},
        {"num_experts": 8, "head_dim": 128, "expert_ffn_hidden_size": 14336,
         "aux_loss_coeff": 0.02, "tied": False, "norm_epsilon": 1e-5},
    ),
    "qwen2": (
        {"hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
         "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
         "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
         "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
         "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936},
        {"qkv_bias": True, "tied": True, "head_dim": 64, "num_experts": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HUB_CONFIGS)
def test_config_of_transformers_4_is_read(kind: str) -> None:
    config, expected = HUB_CONFIGS[kind]
    found = from_hugging_face(config | {"model_type": kind})
    assert {name: getattr(found, name) for name in expected} == expected


def test_missing_fields_have_the_defaults_of_transformers() -> None:
    # Mixtral's base differs from the others'; Qwen3's heads are 128 wide whatever the model is.
    assert from_hugging_face({"model_type": "mixtral"}).rotary_base == 1e6
    assert from_hugging_face({"model_type": "qwen3", "hidden_size": 1024}).head_dim == 128


def test_sparse_step_and_dense_layers_are_combined() -> None:
    config = to_hugging_face(variant("qwen3_moe"), "float32") | {
        "num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3],
    }  # fmt: skip
    architecture = from_hugging_face(config)
    assert architecture.dense_layers == (0, 2, 3, 4, 6)
    assert to_megatron(architecture)["moe_layer_freq"] == [0, 1, 0, 0, 0, 1, 0, 1]
    # Megatron's frequency counts from the first layer.
    args = to_megatron(variant("qwen3_moe")) | {"num_layers": 5, "moe_layer_freq": 2}
    assert from_megatron(args, 40).dense_layers == (1, 3)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("mixtral", {"moe_router_pre_softmax": True}),
        ("mixtral", {"moe_layer_freq": [1, 0]}),
        ("mixtral", {"add_qkv_bias": True}),
        ("qwen2", {"qk_layernorm": True}),
        ("qwen3", {"moe_layer_freq": [0, 0], "num_experts": 4}),
        ("qwen3_moe", {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True}),
        ("qwen2_moe", {"moe_shared_expert_gate": False}),
        ("qwen3_moe", {"moe_router_load_balancing_type": "sinkhorn"}),
        ("qwen3_moe", {"moe_router_load_balancing_type": ["aux_loss", "quantile_balancing"]}),
    ],
    ids=str,
)
def test_megatron_model_without_an_architecture_of_transformers_is_refused(
    kind: str, change: dict[str, Any]
) -> None:
    name = next(iter(change))
    with pytest.raises(LETError, match=name):
        to_hugging_face(from_megatron(to_megatron(variant(kind)) | change, 40), "float32")


@pytest.mark.parametrize(
    "change",
    [
        {"normalization": "LayerNorm"},
        {"swiglu": False},
        {"add_bias_linear": True},
        {"rotary_percent": 0.5},
        {"rotary_interleaved": True},
        {"position_embedding_type": "learned_absolute"},
        {"multi_latent_attention": True},
        {"window_size": (128, 0)},
        {"hybrid_layer_pattern": "*-*-"},
        {"glu_linear_offset": 1.0},
        {"activation_func_clamp_value": 7.0},
        {"experimental_attention_variant": "dsa"},
    ],
    ids=str,
)
def test_megatron_model_of_another_family_is_refused(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(LETError, match=name):
        from_megatron(to_megatron(LLAMA) | change, 40)


# They have an effect only beside another argument, which is refused.
DEPENDENT = {
    "window_attn_skip_freq", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim",
    "v_head_dim", "rotary_scaling_factor", "mscale", "mscale_all_dim", "linear_attention_freq",
    "mup_embedding_mult", "mup_output_mult", "rope_scaling_factor",
    # Without experts.
    "num_experts",
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURE_ARGUMENTS)
def test_argument_that_changes_the_model_is_converted_or_refused(name: str) -> None:
    if name in DEPENDENT:
        return
    kind = "qwen2_moe" if "shared" in name else "qwen3_moe" if name.startswith("moe_") else "gqa"
    args = to_megatron(variant(kind)) | {"group_query_attention": True}
    value = args.get(name)
    other: Any = 7
    if isinstance(value, bool):
        other = not value
    elif isinstance(value, int | float):
        other = value * 2 or 1.0
    elif isinstance(value, str):
        other = "other"
    try:
        assert from_megatron(args | {name: other}, 40) != from_megatron(args, 40)
    except LETError as error:
        assert name in str(error)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"rotary_base": 20000.0}, "--rotary-base"),
        ({"norm_epsilon": 1e-6}, "--norm-epsilon"),
        ({"tied": True}, "--untie-embeddings-and-output-weights"),
        ({"rope_type": "llama3", "rope_factor": 8.0}, "--use-rope-scaling"),
        ({"num_kv_heads": 6}, "--num-query-groups"),
        ({"qkv_bias": True}, "--add-qkv-bias"),
        ({"qk_norm": True}, "--qk-layernorm"),
        ({"num_experts": 4}, "--num-experts"),
    ],
)
def test_first_difference_names_a_flag_that_keeps_shapes(change: dict[str, Any], flag: str) -> None:
    found = first_difference(arguments(LLAMA, **change), arguments(LLAMA))
    assert found is not None and found[0].startswith(flag)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"experts_per_token": 3}, "--moe-router-topk"),
        ({"normalized_routing": False}, "--moe-router-pre-softmax"),
        ({"dense_layers": (0,)}, "--moe-layer-freq"),
        ({"expert_ffn_hidden_size": 20}, "--moe-ffn-hidden-size"),
        ({"shared_ffn_hidden_size": 8}, "--moe-shared-expert-intermediate-size"),
    ],
)
def test_first_difference_names_a_flag_of_experts(change: dict[str, Any], flag: str) -> None:
    experts = variant("qwen3_moe")
    found = first_difference(arguments(experts, **change), arguments(experts))
    assert found is not None and found[0] == flag


def test_rounded_epsilon_is_equal() -> None:
    # GGUF files store it in fp32.
    rounded = arguments(LLAMA, norm_epsilon=9.999999747378752e-06)
    assert first_difference(rounded, arguments(LLAMA)) is None


def test_two_scalings_of_rope_are_refused() -> None:
    args = to_megatron(variant("llama3 rope")) | {"rotary_seq_len_interpolation_factor": 4}
    with pytest.raises(LETError, match="rotary_seq_len_interpolation_factor is 4"):
        from_megatron(args, 256)


def test_recipe_settings_use_megatron_flags() -> None:
    settings = recipe_settings(variant("llama3 rope"))
    # Megatron's default is 0.1.
    assert settings["attention-dropout"] == settings["hidden-dropout"] == 0.0
    assert settings["num-query-groups"] == 3 and settings["rope-scaling-factor"] == 32.0
    assert "kv-channels" not in settings and "kv-channels" in recipe_settings(variant("wide heads"))


def test_recipe_settings_of_experts_are_flags_that_make_the_architecture() -> None:
    settings = recipe_settings(variant("qwen3_moe, dense layers, not normalised"))
    assert settings["qk-layernorm"] and settings["moe-router-pre-softmax"]
    assert settings["moe-layer-freq"] == "[1,0]" and settings["moe-ffn-hidden-size"] == 12
    assert not any(name.startswith("moe") for name in recipe_settings(variant("qwen2")))


STOCK_RUN = {"train_iters": 5, "use_rope_scaling": True, "rope_scaling_factor": 32.0}


@pytest.mark.parametrize(
    ("change", "factor", "ignored"),
    [
        ({}, 8.0, 32.0),
        ({"rope_scaling_factor": 8.0}, 8.0, None),
        ({"applies_rope_scaling_factor": True}, 32.0, None),
        ({"let_method": "let"}, 8.0, 32.0),
        ({"use_rope_scaling": False}, 1.0, None),
    ],
)
def test_factor_that_a_stock_run_ignored_is_not_that_of_the_model(
    change: dict[str, Any], factor: float, ignored: float | None
) -> None:
    args = to_megatron(LLAMA) | STOCK_RUN | change
    assert from_megatron(args, 40).rope_factor == factor
    assert ignored_rope_factor(args) == ignored


def test_factor_of_a_converted_checkpoint_is_its_own() -> None:
    args = to_megatron(variant("llama3 rope"))
    assert from_megatron(args, 40).rope_factor == 32.0 and ignored_rope_factor(args) is None
