"""A Llama's architecture in Hugging Face's config and in Megatron's arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig

from megatron_let.checkpoint.architecture import (
    first_difference,
    from_megatron,
    recipe_settings,
    to_megatron,
)
from megatron_let.checkpoint.load_check import ARCHITECTURE_ARGUMENTS
from megatron_let.checkpoint.model_types import from_hugging_face, to_hugging_face
from megatron_let.config.arguments import padded_vocab_size
from megatron_let.errors import LETError
from tests.helpers.llamas import LLAMA, VARIANTS, config_arguments, variant


@pytest.mark.parametrize("name", VARIANTS)
def test_config_round_trips_through_both_formats(name: str) -> None:
    llama = variant(name)
    assert from_hugging_face(to_hugging_face(llama, "bfloat16")) == llama
    assert from_megatron(to_megatron(llama), llama.vocab_size) == llama
    # As transformers of this version writes it.
    theirs = LlamaConfig(**config_arguments(to_hugging_face(llama, "float32"))).to_dict()
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
        ({"model_type": "qwen2"}, "'qwen2'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0,
                           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
         "low_freq_factor"),
        ({"rope_theta": 10000.5}, "10000.5"),
    ],
)  # fmt: skip
def test_unsupported_hugging_face_model_is_refused(change: dict[str, Any], words: str) -> None:
    config = to_hugging_face(LLAMA, "float32") | change
    with pytest.raises(LETError, match=words):
        from_hugging_face(config)


@pytest.mark.parametrize(
    "change",
    [
        {"normalization": "LayerNorm"},
        {"swiglu": False},
        {"add_bias_linear": True},
        {"add_qkv_bias": True},
        {"qk_layernorm": True},
        {"rotary_percent": 0.5},
        {"rotary_interleaved": True},
        {"position_embedding_type": "learned_absolute"},
        {"num_experts": 8},
        {"multi_latent_attention": True},
        {"window_size": (128, 0)},
        {"hybrid_layer_pattern": "*-*-"},
        {"glu_linear_offset": 1.0},
        {"activation_func_clamp_value": 7.0},
        {"experimental_attention_variant": "dsa"},
    ],
    ids=str,
)
def test_megatron_model_that_is_not_a_llama_is_refused(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(LETError, match=name):
        from_megatron(to_megatron(LLAMA) | change, 40)


# They have an effect only beside another argument, which is refused.
DEPENDENT = {
    "window_attn_skip_freq", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim",
    "v_head_dim", "rotary_scaling_factor", "mscale", "mscale_all_dim", "linear_attention_freq",
    "mup_embedding_mult", "mup_output_mult", "rope_scaling_factor",
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURE_ARGUMENTS)
def test_argument_that_changes_the_model_is_converted_or_refused(name: str) -> None:
    if name in DEPENDENT or name.startswith("moe_"):
        return
    args = to_megatron(LLAMA) | {"group_query_attention": True}
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
    ],
)
def test_first_difference_names_a_flag_that_keeps_shapes(change: dict[str, Any], flag: str) -> None:
    found = first_difference(replace(LLAMA, **change), LLAMA)
    assert found is not None and found[0].startswith(flag)


def test_rounded_epsilon_is_equal() -> None:
    # GGUF files store it in fp32.
    assert first_difference(replace(LLAMA, norm_epsilon=9.999999747378752e-06), LLAMA) is None


def test_recipe_settings_use_megatron_flags() -> None:
    settings = recipe_settings(variant("llama3 rope"))
    assert settings["num-query-groups"] == 3 and settings["rope-scaling-factor"] == 32.0
    assert "kv-channels" not in settings and "kv-channels" in recipe_settings(variant("wide heads"))
