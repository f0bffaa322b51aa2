"""Our map beside Megatron-Bridge's, where it can be imported (it needs Transformer Engine)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_let.checkpoint.architecture import Llama
from megatron_let.checkpoint.parameter_mapping import blocks, merge

BRIDGE = "megatron.bridge.models"
REASON = "Megatron-Bridge is not installed: it needs CUDA and Transformer Engine"
LLAMA = Llama(2, 24, 20, 6, 3, 4, 40, 64, False, 1e-5)


def test_names_are_the_bridges() -> None:
    llama_bridge = pytest.importorskip(f"{BRIDGE}.llama.llama_bridge", reason=REASON)
    theirs = {}
    for mapping in llama_bridge.LlamaBridge().mapping_registry().get_all_mappings():
        names = mapping.hf_param
        theirs[mapping.megatron_param] = set(names.values() if isinstance(names, dict) else [names])
    for block in blocks(LLAMA):
        stacked = block.megatron[0].replace("decoder.layers.", "decoder.layers.*.")
        assert {name.replace(f".{block.layer}.", ".*.") for name in block.names} == theirs[stacked]


def test_query_key_value_order_is_the_bridges() -> None:
    mapping = pytest.importorskip(f"{BRIDGE}.conversion.param_mapping", reason=REASON)
    provider = SimpleNamespace(
        num_attention_heads=6, num_query_groups=3, kv_channels=4, hidden_size=24
    )
    (block,) = [b for b in blocks(LLAMA) if b.kind == "qkv" and b.layer == 0]
    parts = tuple(torch.randn(shape) for _, shape in block.tensors)
    theirs = mapping.merge_qkv_weights(provider, *parts)
    assert torch.equal(merge(block, parts, LLAMA), theirs)
