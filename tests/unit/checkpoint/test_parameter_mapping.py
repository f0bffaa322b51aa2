"""The mapping between Megatron's tensors and Hugging Face's, against independent definitions."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_let.checkpoint.model_types import to_hugging_face
from megatron_let.checkpoint.parameter_mapping import (
    ParameterMapping,
    merge,
    num_parameters,
    parameter_mappings,
    split,
)
from tests.helpers.llamas import LLAMA, VARIANTS, variant

# Megatron-Bridge can only be imported with Transformer Engine.
BRIDGE = "megatron.bridge.models"
REASON = "Megatron-Bridge is not installed: it needs CUDA and Transformer Engine"


@pytest.mark.parametrize("name", VARIANTS)
def test_names_and_shapes_are_those_that_transformers_writes(name: str, tmp_path: Path) -> None:
    llama = variant(name)
    config = AutoConfig.for_model(**to_hugging_face(llama, "float32"))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    ours = dict(tensor for mapping in parameter_mappings(llama) for tensor in mapping.tensors)
    assert ours == {key: tuple(value.shape) for key, value in theirs.items()}
    assert num_parameters(llama) == sum(value.numel() for value in theirs.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_merge_is_the_inverse_of_split(name: str) -> None:
    llama = variant(name)
    for mapping in parameter_mappings(llama):
        tensor = torch.randn(mapping.shape)
        parts = split(mapping, tensor, llama)
        assert [tuple(p.shape) for p in parts] == [shape for _, shape in mapping.tensors]
        assert torch.equal(merge(mapping, parts, llama), tensor)


def _mapping(ending: str) -> ParameterMapping:
    return next(m for m in parameter_mappings(LLAMA) if m.megatron[0].endswith(ending))


def test_qkv_is_interleaved_by_query_group() -> None:
    # Each row encodes 100 x kind + head.
    kinds = {"q": range(6), "k": range(3), "v": range(3)}
    number = {"q": 100, "k": 200, "v": 300}
    order = [("q", 0), ("q", 1), ("k", 0), ("v", 0), ("q", 2), ("q", 3), ("k", 1), ("v", 1),
             ("q", 4), ("q", 5), ("k", 2), ("v", 2)]  # fmt: skip
    rows = [number[kind] + head for kind, head in order for _ in range(LLAMA.head_dim)]
    tensor = torch.tensor(rows, dtype=torch.float32)[:, None].expand(-1, LLAMA.hidden_size)
    parts = split(_mapping("linear_qkv.weight"), tensor, LLAMA)
    for part, (kind, heads) in zip(parts, kinds.items(), strict=True):
        expected = [number[kind] + head for head in heads for _ in range(LLAMA.head_dim)]
        assert part[:, 0].tolist() == expected


def test_gate_precedes_up() -> None:
    tensor = torch.arange(2 * LLAMA.ffn_hidden_size)[:, None].float()
    gate, up = split(_mapping("linear_fc1.weight"), tensor, LLAMA)
    assert gate[0] == 0 and up[0] == LLAMA.ffn_hidden_size


def test_padded_rows_are_removed() -> None:
    tensor = torch.randn(128, LLAMA.hidden_size)
    (cut,) = split(_mapping("word_embeddings.weight"), tensor, LLAMA)
    assert torch.equal(cut, tensor[: LLAMA.vocab_size])


BRIDGES = {
    "gqa": ("llama.llama_bridge", "LlamaBridge"),
    "qwen2": ("qwen.qwen2_bridge", "Qwen2Bridge"),
    "qwen3": ("qwen.qwen3_bridge", "Qwen3Bridge"),
    "qwen3_moe": ("qwen.qwen3_moe_bridge", "Qwen3MoEBridge"),
}


@pytest.mark.parametrize("name", BRIDGES)
def test_names_match_megatron_bridge(name: str) -> None:
    module, bridge = BRIDGES[name]
    loaded = pytest.importorskip(f"{BRIDGE}.{module}", reason=REASON)
    theirs = {}
    for mapping in getattr(loaded, bridge)().mapping_registry().get_all_mappings():
        names = mapping.hf_param
        # A module's expert has its number after `weight`, a checkpoint's is on an axis.
        stored = mapping.megatron_param.replace("weight*", "weight")
        theirs[stored] = set(names.values() if isinstance(names, dict) else [names])
    for mapping in parameter_mappings(variant(name)):
        stacked = mapping.megatron[0].replace("decoder.layers.", "decoder.layers.*.")
        ours = {re.sub(r"\.\d+\.", ".*.", name) for name in mapping.names}
        assert ours == theirs[stacked.replace("experts.experts.", "experts.")]


def test_qkv_order_matches_megatron_bridge() -> None:
    conversion = pytest.importorskip(f"{BRIDGE}.conversion.param_mapping", reason=REASON)
    provider = SimpleNamespace(
        num_attention_heads=6, num_query_groups=3, kv_channels=4, hidden_size=24
    )
    (mapping,) = [m for m in parameter_mappings(LLAMA) if m.kind == "qkv" and m.layer == 0]
    parts = tuple(torch.randn(shape) for _, shape in mapping.tensors)
    theirs = conversion.merge_qkv_weights(provider, *parts)
    assert torch.equal(merge(mapping, parts, LLAMA), theirs)
