"""The mapping between Megatron's tensors of a Llama and Hugging Face's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_let.checkpoint.architecture import Llama

Kind = Literal["copy", "vocabulary", "qkv", "gate_up"]

# Prefix of a learned projection's tensors (`--let-projection learned`), not part of the model.
PROJECTION = "let_projection"


@dataclass(frozen=True)
class ParameterMapping:
    """One of Megatron's tensors, and the Hugging Face tensors that it consists of.

    Attributes:
        kind: arrangement of the tensors in it; `vocabulary` may have padded rows at the end.
        megatron: its name with Transformer Engine, then without if that differs.
        layer: 0-based; None outside the layers. A torch_dist checkpoint stacks the layers of one
            name along the first axis.
        tensors: Hugging Face names and shapes.
    """

    kind: Kind
    megatron: tuple[str, ...]
    layer: int | None
    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the Hugging Face names."""
        return tuple(name for name, _ in self.tensors)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of Megatron's tensor, without padding and without the layer axis."""
        rows = sum(shape[0] for _, shape in self.tensors)
        return (rows, *self.tensors[0][1][1:])


def parameter_mappings(llama: Llama) -> list[ParameterMapping]:
    """Return the mapping of every tensor, in the order of Hugging Face's files."""
    hidden, vocabulary = llama.hidden_size, (llama.vocab_size, llama.hidden_size)
    embedding = ("embedding.word_embeddings.weight",)
    tokens = (("model.embed_tokens.weight", vocabulary),)
    found = [ParameterMapping("vocabulary", embedding, None, tokens)]
    for index in range(llama.num_layers):
        found += _layer_mappings(llama, index)
    final_norm = ("decoder.final_layernorm.weight",)
    norm = (("model.norm.weight", (hidden,)),)
    found.append(ParameterMapping("copy", final_norm, None, norm))
    if not llama.tied:
        output = ("output_layer.weight",)
        head = (("lm_head.weight", vocabulary),)
        found.append(ParameterMapping("vocabulary", output, None, head))
    return found


def _layer_mappings(llama: Llama, index: int) -> list[ParameterMapping]:
    hidden, ffn = llama.hidden_size, llama.ffn_hidden_size
    queries = llama.num_heads * llama.head_dim
    keys = llama.num_kv_heads * llama.head_dim
    theirs, ours = f"model.layers.{index}.", "decoder.layers."

    def mapping(
        kind: Kind, megatron: tuple[str, ...], *tensors: tuple[str, tuple[int, ...]]
    ) -> ParameterMapping:
        names = tuple(ours + name for name in megatron)
        parts = tuple((f"{theirs}{name}.weight", shape) for name, shape in tensors)
        return ParameterMapping(kind, names, index, parts)

    return [
        mapping(
            "copy",
            ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
            ("input_layernorm", (hidden,)),
        ),
        mapping(
            "qkv",
            ("self_attention.linear_qkv.weight",),
            ("self_attn.q_proj", (queries, hidden)),
            ("self_attn.k_proj", (keys, hidden)),
            ("self_attn.v_proj", (keys, hidden)),
        ),
        mapping(
            "copy",
            ("self_attention.linear_proj.weight",),
            ("self_attn.o_proj", (hidden, queries)),
        ),
        mapping(
            "copy",
            ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
            ("post_attention_layernorm", (hidden,)),
        ),
        mapping(
            "gate_up",
            ("mlp.linear_fc1.weight",),
            ("mlp.gate_proj", (ffn, hidden)),
            ("mlp.up_proj", (ffn, hidden)),
        ),
        mapping("copy", ("mlp.linear_fc2.weight",), ("mlp.down_proj", (hidden, ffn))),
    ]


# Entries without tensors that Megatron's modules require on load; Transformer Engine stores FP8
# scales there. Names in a layer, then outside.
EXTRA_STATES = (
    "decoder.layers.self_attention.linear_qkv",
    "decoder.layers.self_attention.core_attention",
    "decoder.layers.self_attention.linear_proj",
    "decoder.layers.mlp.linear_fc1",
    "decoder.layers.mlp.linear_fc2",
)
EXTRA_STATES_ONCE = ("decoder.final_layernorm",)


def split(
    mapping: ParameterMapping, tensor: torch.Tensor, llama: Llama
) -> tuple[torch.Tensor, ...]:
    """Split Megatron's tensor into Hugging Face's, in the order of `mapping.tensors`.

    Args:
        tensor: tensor of shape `mapping.shape`; a vocabulary may have padded rows.
    """
    if mapping.kind == "vocabulary":
        return (tensor[: llama.vocab_size],)
    if mapping.kind == "gate_up":
        return tuple(tensor.chunk(2))
    if mapping.kind == "qkv":
        return _split_qkv(tensor, llama)
    return (tensor,)


def merge(
    mapping: ParameterMapping, tensors: tuple[torch.Tensor, ...], llama: Llama
) -> torch.Tensor:
    """Merge Hugging Face's tensors into Megatron's; the inverse of `split`."""
    if mapping.kind == "gate_up":
        return torch.cat(tensors)
    if mapping.kind == "qkv":
        return _merge_qkv(tensors, llama)
    return tensors[0]


def _split_qkv(tensor: torch.Tensor, llama: Llama) -> tuple[torch.Tensor, ...]:
    """Split [groups * (q + 2) * d, h] into queries, keys and values.

    Megatron stores, for each query group, its q query heads, its key head and its value head.
    """
    per_group = llama.num_heads // llama.num_kv_heads
    grouped = tensor.view(llama.num_kv_heads, per_group + 2, llama.head_dim, -1)
    parts = (grouped[:, :per_group], grouped[:, per_group], grouped[:, per_group + 1])
    return tuple(part.reshape(-1, tensor.shape[1]) for part in parts)


def _merge_qkv(tensors: tuple[torch.Tensor, ...], llama: Llama) -> torch.Tensor:
    hidden = tensors[0].shape[1]
    shape = (llama.num_kv_heads, -1, llama.head_dim, hidden)
    return torch.cat([part.view(shape) for part in tensors], dim=1).reshape(-1, hidden)
