"""Which Megatron tensor holds which Hugging Face tensors of a Llama, and in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_let.checkpoint.architecture import Llama

Kind = Literal["copy", "vocabulary", "qkv", "gate_up"]

# Begins the names of a learned projection (`--let-projection learned`), no part of the model.
PROJECTION = "let_projection"


@dataclass(frozen=True)
class Block:
    """One tensor of Megatron and what it is made of.

    Attributes:
        kind: how the tensors lie in it; `vocabulary` may have padded rows at its end.
        megatron: its name with Transformer Engine, then without where that differs.
        layer: 0-based; None outside the layers. A torch_dist checkpoint stacks the layers of one
            name along a first axis.
        tensors: Hugging Face names and shapes.
    """

    kind: Kind
    megatron: tuple[str, ...]
    layer: int | None
    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The Hugging Face names."""
        return tuple(name for name, _ in self.tensors)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of Megatron's tensor, without padding and without the axis of layers."""
        rows = sum(shape[0] for _, shape in self.tensors)
        return (rows, *self.tensors[0][1][1:])


def blocks(llama: Llama) -> list[Block]:
    """Every tensor of the model, in the order of Hugging Face's files."""
    hidden, vocabulary = llama.hidden_size, (llama.vocab_size, llama.hidden_size)
    embedding = ("embedding.word_embeddings.weight",)
    found = [Block("vocabulary", embedding, None, (("model.embed_tokens.weight", vocabulary),))]
    for index in range(llama.num_layers):
        found += _layer_blocks(llama, index)
    final_norm = ("decoder.final_layernorm.weight",)
    found.append(Block("copy", final_norm, None, (("model.norm.weight", (hidden,)),)))
    if not llama.tied:
        output = ("output_layer.weight",)
        found.append(Block("vocabulary", output, None, (("lm_head.weight", vocabulary),)))
    return found


def _layer_blocks(llama: Llama, index: int) -> list[Block]:
    hidden, ffn = llama.hidden_size, llama.ffn_size
    queries = llama.num_heads * llama.head_size
    keys = llama.num_query_groups * llama.head_size
    theirs, ours = f"model.layers.{index}.", "decoder.layers."

    def block(
        kind: Kind, megatron: tuple[str, ...], *tensors: tuple[str, tuple[int, ...]]
    ) -> Block:
        names = tuple(ours + name for name in megatron)
        return Block(kind, names, index, tuple((theirs + n + ".weight", s) for n, s in tensors))

    return [
        block(
            "copy",
            ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
            ("input_layernorm", (hidden,)),
        ),
        block(
            "qkv",
            ("self_attention.linear_qkv.weight",),
            ("self_attn.q_proj", (queries, hidden)),
            ("self_attn.k_proj", (keys, hidden)),
            ("self_attn.v_proj", (keys, hidden)),
        ),
        block(
            "copy",
            ("self_attention.linear_proj.weight",),
            ("self_attn.o_proj", (hidden, queries)),
        ),
        block(
            "copy",
            ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
            ("post_attention_layernorm", (hidden,)),
        ),
        block(
            "gate_up",
            ("mlp.linear_fc1.weight",),
            ("mlp.gate_proj", (ffn, hidden)),
            ("mlp.up_proj", (ffn, hidden)),
        ),
        block("copy", ("mlp.linear_fc2.weight",), ("mlp.down_proj", (hidden, ffn))),
    ]


# Entries without numbers that Megatron's modules ask for when they load; Transformer Engine keeps
# FP8 scales there. Names in a layer, then outside.
EXTRA_STATES = (
    "decoder.layers.self_attention.linear_qkv",
    "decoder.layers.self_attention.core_attention",
    "decoder.layers.self_attention.linear_proj",
    "decoder.layers.mlp.linear_fc1",
    "decoder.layers.mlp.linear_fc2",
)
EXTRA_STATES_ONCE = ("decoder.final_layernorm",)


def split(block: Block, tensor: torch.Tensor, llama: Llama) -> tuple[torch.Tensor, ...]:
    """Take Megatron's tensor apart into Hugging Face's, in the order of `block.tensors`.

    Args:
        tensor: of `block.shape`, or with padded rows where it is a vocabulary.
    """
    if block.kind == "vocabulary":
        return (tensor[: llama.vocab_size],)
    if block.kind == "gate_up":
        return tuple(tensor.chunk(2))
    if block.kind == "qkv":
        return _split_qkv(tensor, llama)
    return (tensor,)


def merge(block: Block, tensors: tuple[torch.Tensor, ...], llama: Llama) -> torch.Tensor:
    """Put Hugging Face's tensors together into Megatron's; the inverse of `split`."""
    if block.kind == "gate_up":
        return torch.cat(tensors)
    if block.kind == "qkv":
        return _merge_qkv(tensors, llama)
    return tensors[0]


def _split_qkv(tensor: torch.Tensor, llama: Llama) -> tuple[torch.Tensor, ...]:
    """[groups * (q + 2) * d, h] of Megatron to queries, keys and values.

    Megatron stores, for each query group, its q query heads, its key head and its value head.
    """
    per_group = llama.num_heads // llama.num_query_groups
    grouped = tensor.view(llama.num_query_groups, per_group + 2, llama.head_size, -1)
    parts = (grouped[:, :per_group], grouped[:, per_group], grouped[:, per_group + 1])
    return tuple(part.reshape(-1, tensor.shape[1]) for part in parts)


def _merge_qkv(tensors: tuple[torch.Tensor, ...], llama: Llama) -> torch.Tensor:
    hidden = tensors[0].shape[1]
    shape = (llama.num_query_groups, -1, llama.head_size, hidden)
    return torch.cat([part.view(shape) for part in tensors], dim=1).reshape(-1, hidden)
