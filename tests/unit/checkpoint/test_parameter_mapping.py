"""The map between Megatron's tensors and Hugging Face's, against independent definitions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_let.checkpoint.architecture import (
    Llama,
    check_layout,
    first_difference,
    from_hugging_face,
    from_megatron,
    padded_vocab_size,
    recipe_settings,
    to_hugging_face,
    to_megatron,
)
from megatron_let.checkpoint.parameter_mapping import Block, blocks, merge, split
from megatron_let.errors import LETError

LLAMA = Llama(
    num_layers=2, hidden_size=24, ffn_size=20, num_heads=6, num_query_groups=3, head_size=4,
    vocab_size=40, max_positions=64, tied=False, norm_epsilon=1e-5,
)  # fmt: skip
VARIANTS = {
    "gqa": {},
    "mha": {"num_query_groups": 6},
    "mqa": {"num_query_groups": 1},
    "tied": {"tied": True},
    "wide heads": {"head_size": 8},
    "odd ffn": {"ffn_size": 5461},
    "llama3 rope": {"rotary_base": 500000.0, "rope_type": "llama3", "rope_factor": 32.0},
    "linear rope": {"rope_type": "linear", "rope_factor": 4.0},
    "epsilon": {"norm_epsilon": 1e-6},
}


def variant(name: str) -> Llama:
    return replace(LLAMA, **VARIANTS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_names_and_shapes_are_transformers_own(name: str) -> None:
    llama = variant(name)
    config = LlamaConfig(**_loaded(to_hugging_face(llama, "float32")))
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config).state_dict()
    if llama.tied:
        del theirs["lm_head.weight"]
    ours = dict(tensor for block in blocks(llama) for tensor in block.tensors)
    assert ours == {key: tuple(value.shape) for key, value in theirs.items()}
    assert llama.num_parameters == sum(value.numel() for value in theirs.values())


def _loaded(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("architectures", "model_type")}


@pytest.mark.parametrize("name", VARIANTS)
def test_config_survives_both_ways(name: str) -> None:
    llama = variant(name)
    assert from_hugging_face(to_hugging_face(llama, "bfloat16")) == llama
    assert from_megatron(to_megatron(llama), llama.vocab_size) == llama
    # As transformers of this version writes it.
    theirs = LlamaConfig(**_loaded(to_hugging_face(llama, "float32"))).to_dict()
    assert from_hugging_face(theirs) == llama


@pytest.mark.parametrize("name", VARIANTS)
def test_merge_is_the_inverse_of_split(name: str) -> None:
    llama = variant(name)
    for block in blocks(llama):
        tensor = torch.randn(block.shape)
        parts = split(block, tensor, llama)
        assert [tuple(p.shape) for p in parts] == [shape for _, shape in block.tensors]
        assert torch.equal(merge(block, parts, llama), tensor)


def _block(ending: str) -> Block:
    return next(b for b in blocks(LLAMA) if b.megatron[0].endswith(ending))


def test_qkv_is_interleaved_by_query_group() -> None:
    # Rows that say what they are: 100 x kind + head.
    kinds = {"q": range(6), "k": range(3), "v": range(3)}
    number = {"q": 100, "k": 200, "v": 300}
    order = [("q", 0), ("q", 1), ("k", 0), ("v", 0), ("q", 2), ("q", 3), ("k", 1), ("v", 1),
             ("q", 4), ("q", 5), ("k", 2), ("v", 2)]  # fmt: skip
    rows = [number[kind] + head for kind, head in order for _ in range(LLAMA.head_size)]
    tensor = torch.tensor(rows, dtype=torch.float32)[:, None].expand(-1, LLAMA.hidden_size)
    parts = split(_block("linear_qkv.weight"), tensor, LLAMA)
    for part, (kind, heads) in zip(parts, kinds.items(), strict=True):
        expected = [number[kind] + head for head in heads for _ in range(LLAMA.head_size)]
        assert part[:, 0].tolist() == expected


def test_gate_comes_before_up() -> None:
    tensor = torch.arange(2 * LLAMA.ffn_size)[:, None].float()
    gate, up = split(_block("linear_fc1.weight"), tensor, LLAMA)
    assert gate[0] == 0 and up[0] == LLAMA.ffn_size


def test_padded_rows_are_cut() -> None:
    tensor = torch.randn(128, LLAMA.hidden_size)
    (cut,) = split(_block("word_embeddings.weight"), tensor, LLAMA)
    assert torch.equal(cut, tensor[: LLAMA.vocab_size])


@pytest.mark.parametrize(
    ("vocab_size", "divisible_by", "tensor_parallel", "rows"),
    [(49152, 128, 1, 49152), (50257, 128, 1, 50304), (50257, 128, 2, 50432), (32000, 128, 8, 32768),
     (100, 1, 1, 100)],
)  # fmt: skip
def test_vocabulary_is_padded_as_megatron_does(
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
def test_hugging_face_model_that_megatron_lacks_is_refused(
    change: dict[str, Any], words: str
) -> None:
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
    ],
    ids=str,
)
def test_megatron_model_that_is_no_llama_is_refused(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(LETError, match=name):
        from_megatron(to_megatron(LLAMA) | change, 40)


@pytest.mark.parametrize(
    ("tensor_parallel", "pipeline_parallel", "words"),
    [(4, 1, "6 attention heads"), (1, 3, "2 layers"), (6, 1, "20 feed-forward units")],
)
def test_layout_that_does_not_divide_is_refused(
    tensor_parallel: int, pipeline_parallel: int, words: str
) -> None:
    with pytest.raises(LETError, match=words):
        check_layout(LLAMA, tensor_parallel, pipeline_parallel)


def test_layout_with_replicated_groups_is_accepted() -> None:
    check_layout(replace(LLAMA, num_query_groups=1), 2, 2)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"rotary_base": 20000.0}, "--rotary-base"),
        ({"norm_epsilon": 1e-6}, "--norm-epsilon"),
        ({"tied": True}, "--untie-embeddings-and-output-weights"),
        ({"rope_type": "llama3", "rope_factor": 8.0}, "--use-rope-scaling"),
        ({"num_query_groups": 6}, "--num-query-groups"),
    ],
)
def test_a_change_that_shapes_do_not_show_is_named(change: dict[str, Any], flag: str) -> None:
    found = first_difference(replace(LLAMA, **change), LLAMA)
    assert found is not None and found[0].startswith(flag)


def test_rounded_epsilon_is_no_difference() -> None:
    # As GGUF files keep it.
    assert first_difference(replace(LLAMA, norm_epsilon=9.999999747378752e-06), LLAMA) is None


def test_recipe_of_a_converted_model_names_megatrons_flags() -> None:
    settings = recipe_settings(variant("llama3 rope"))
    assert settings["num-query-groups"] == 3 and settings["rope-scaling-factor"] == 32.0
    assert "kv-channels" not in settings and "kv-channels" in recipe_settings(variant("wide heads"))
