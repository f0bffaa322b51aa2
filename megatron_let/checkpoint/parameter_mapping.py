"""The mapping between Megatron's tensors and Hugging Face's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_let.checkpoint.architecture import Architecture
from megatron_let.checkpoint.model_types import ModelType, model_type_of

Kind = Literal["copy", "vocabulary", "qkv", "gate_up"]

# Prefix of a learned projection's tensors (`--let-projection learned`), not part of the model.
PROJECTION = "let_projection"
_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class ParameterMapping:
    """One of Megatron's tensors, and the Hugging Face tensors that it consists of.

    Attributes:
        kind: arrangement of the tensors in it; `vocabulary` may have padded rows at the end.
        megatron: its name with Transformer Engine, then without if that differs.
        layer: 0-based; None outside the layers. A torch_dist checkpoint stacks the layers of one
            name along the first axis, unless some of them have no experts.
        expert: 0-based; None outside the experts, which are stacked along the next axis.
        tensors: Hugging Face names and shapes.
    """

    kind: Kind
    megatron: tuple[str, ...]
    layer: int | None
    expert: int | None
    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the Hugging Face names."""
        return tuple(name for name, _ in self.tensors)

    @property
    def index(self) -> tuple[int, ...]:
        """Return the index on the axes of layers and experts."""
        return tuple(number for number in (self.layer, self.expert) if number is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of Megatron's tensor, without padding, layers' and experts' axes."""
        rows = sum(shape[0] for _, shape in self.tensors)
        return (rows, *self.tensors[0][1][1:])


def parameter_mappings(architecture: Architecture) -> list[ParameterMapping]:
    """Return the mapping of every tensor, in the order of Hugging Face's files.

    Raises:
        LETError: transformers has no such architecture.
    """
    kind = model_type_of(architecture)
    hidden = architecture.hidden_size
    vocabulary = (architecture.vocab_size, hidden)
    embedding = ("embedding.word_embeddings.weight",)
    tokens = (("model.embed_tokens.weight", vocabulary),)
    found = [ParameterMapping("vocabulary", embedding, None, None, tokens)]
    for index in range(architecture.num_layers):
        found += _attention_mappings(architecture, index)
        if architecture.has_experts(index):
            found += _expert_mappings(architecture, kind, index)
        else:
            sizes = hidden, architecture.ffn_hidden_size
            found += _mlp_mappings(index, "mlp.", "mlp.", sizes)
    final_norm = ("decoder.final_layernorm.weight",)
    norm = (("model.norm.weight", (hidden,)),)
    found.append(ParameterMapping("copy", final_norm, None, None, norm))
    if not architecture.tied:
        output = ("output_layer.weight",)
        head = (("lm_head.weight", vocabulary),)
        found.append(ParameterMapping("vocabulary", output, None, None, head))
    return found


def unstacked(mapping: ParameterMapping) -> tuple[str, ...]:
    """Return Megatron's names of a tensor of one layer, where each layer has separate names."""
    return tuple(
        name.replace(_LAYERS, f"{_LAYERS}{mapping.layer}.", 1) for name in mapping.megatron
    )


def num_parameters(architecture: Architecture) -> int:
    """Return the number of parameters without padding; a tied embedding counts once."""
    return sum(math.prod(mapping.shape) for mapping in parameter_mappings(architecture))


def _mapping(
    kind: Kind,
    layer: int,
    megatron: tuple[str, ...],
    *tensors: tuple[str, tuple[int, ...]],
    expert: int | None = None,
) -> ParameterMapping:
    """Return the mapping of a tensor in a layer, whose names are given without the layer's."""
    names = tuple(f"{_LAYERS}{name}" for name in megatron)
    parts = tuple((f"model.layers.{layer}.{name}", shape) for name, shape in tensors)
    return ParameterMapping(kind, names, layer, expert, parts)


def _attention_mappings(architecture: Architecture, layer: int) -> list[ParameterMapping]:
    hidden, head = architecture.hidden_size, architecture.head_dim
    rows = {
        "self_attn.q_proj": architecture.num_heads * head,
        "self_attn.k_proj": architecture.num_kv_heads * head,
        "self_attn.v_proj": architecture.num_kv_heads * head,
    }
    weights = [(f"{name}.weight", (count, hidden)) for name, count in rows.items()]
    fused = "self_attention.linear_qkv"
    norms = "input_layernorm.weight"
    # Without experts, Transformer Engine and Megatron's local layers name the second norm alike.
    second = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    if architecture.has_experts(layer):
        second = second[::-1]
    output = ("self_attn.o_proj.weight", (hidden, architecture.num_heads * head))
    found = [
        _mapping("copy", layer, (f"{fused}.layer_norm_weight", norms), (norms, (hidden,))),
        _mapping("qkv", layer, (f"{fused}.weight",), *weights),
        _mapping("copy", layer, ("self_attention.linear_proj.weight",), output),
        _mapping("copy", layer, second, ("post_attention_layernorm.weight", (hidden,))),
    ]
    if architecture.qkv_bias:
        biases = [(f"{name}.bias", (count,)) for name, count in rows.items()]
        found.append(_mapping("qkv", layer, (f"{fused}.bias",), *biases))
    for name in "qk" if architecture.qk_norm else "":
        ours = (f"self_attention.{name}_layernorm.weight",)
        found.append(_mapping("copy", layer, ours, (f"self_attn.{name}_norm.weight", (head,))))
    return found


def _mlp_mappings(
    layer: int,
    ours: str,
    theirs: str,
    sizes: tuple[int, int],
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    expert: int | None = None,
) -> list[ParameterMapping]:
    """Return the mappings of one gated MLP.

    Args:
        ours, theirs: prefix of its tensors in a layer.
        sizes: hidden size and width.
        names: Hugging Face's gate, up and down projection.
    """
    hidden, ffn = sizes
    gate, up, down = (f"{theirs}{name}.weight" for name in names)
    first, second = (f"{ours}linear_fc1.weight",), (f"{ours}linear_fc2.weight",)
    halves = ((gate, (ffn, hidden)), (up, (ffn, hidden)))
    return [
        _mapping("gate_up", layer, first, *halves, expert=expert),
        _mapping("copy", layer, second, (down, (hidden, ffn)), expert=expert),
    ]


def _expert_mappings(
    architecture: Architecture, kind: ModelType, layer: int
) -> list[ParameterMapping]:
    hidden = architecture.hidden_size
    router = (f"{kind.experts}.gate.weight", (architecture.num_experts, hidden))
    found = [_mapping("copy", layer, ("mlp.router.weight",), router)]
    sizes = hidden, architecture.expert_ffn_hidden_size
    names = kind.gate, kind.up, kind.down
    for expert in range(architecture.num_experts):
        theirs = f"{kind.experts}.experts.{expert}."
        # Megatron's two classes of experts, one GEMM for each or for all, write the same names.
        found += _mlp_mappings(layer, "mlp.experts.experts.", theirs, sizes, names, expert)
    if kind.has_shared_expert:
        sizes = hidden, architecture.shared_ffn_hidden_size
        found += _mlp_mappings(layer, "mlp.shared_experts.", "mlp.shared_expert.", sizes)
        gate = ("mlp.shared_expert_gate.weight", (1, hidden))
        found.append(_mapping("copy", layer, ("mlp.shared_experts.gate_weight",), gate))
    return found


def extra_states(architecture: Architecture) -> list[str]:
    """Return the entries without tensors that Megatron's modules require on load.

    Transformer Engine stores FP8 scales there.
    """
    found = ["decoder.final_layernorm._extra_state/shard_0_1"]
    for layer in range(architecture.num_layers):
        modules = ["linear_qkv", "core_attention", "linear_proj"]
        modules += ["q_layernorm", "k_layernorm"] if architecture.qk_norm else []
        names = [f"self_attention.{name}" for name in modules]
        mlps: list[tuple[str, int | None]] = [("mlp.", None)]
        if architecture.has_experts(layer):
            names.append("pre_mlp_layernorm")
            shared = [("mlp.shared_experts.", None)] if architecture.shared_ffn_hidden_size else []
            experts = range(architecture.num_experts)
            mlps = [*shared, *(("mlp.experts.experts.", expert) for expert in experts)]
        parts: list[tuple[str, int | None]] = [(name, None) for name in names]
        parts += [(f"{mlp}linear_fc{i}", expert) for mlp, expert in mlps for i in (1, 2)]
        found += [_extra_state(architecture, layer, name, expert) for name, expert in parts]
    return found


def _extra_state(architecture: Architecture, layer: int, name: str, expert: int | None) -> str:
    axes = [] if expert is None else [(expert, architecture.num_experts)]
    if architecture.dense_layers:
        prefix, axes = f"{_LAYERS}{layer}.", axes or [(0, 1)]
    else:
        prefix, axes = _LAYERS, [(layer, architecture.num_layers), *axes]
    index, size = (".".join(map(str, numbers)) for numbers in zip(*axes, strict=True))
    return f"{prefix}{name}._extra_state/shard_{index}_{size}"


def split(
    mapping: ParameterMapping, tensor: torch.Tensor, architecture: Architecture
) -> tuple[torch.Tensor, ...]:
    """Split Megatron's tensor into Hugging Face's, in the order of `mapping.tensors`.

    Args:
        tensor: tensor of shape `mapping.shape`; a vocabulary may have padded rows.
    """
    if mapping.kind == "vocabulary":
        return (tensor[: architecture.vocab_size],)
    if mapping.kind == "gate_up":
        return tuple(tensor.chunk(2))
    if mapping.kind == "qkv":
        return _split_qkv(tensor, architecture)
    return (tensor,)


def merge(
    mapping: ParameterMapping, tensors: tuple[torch.Tensor, ...], architecture: Architecture
) -> torch.Tensor:
    """Merge Hugging Face's tensors into Megatron's; the inverse of `split`."""
    if mapping.kind == "gate_up":
        return torch.cat(tensors)
    if mapping.kind == "qkv":
        return _merge_qkv(tensors, architecture)
    return tensors[0]


def _split_qkv(tensor: torch.Tensor, architecture: Architecture) -> tuple[torch.Tensor, ...]:
    """Split [groups * (q + 2) * d, h], or biases [groups * (q + 2) * d], into q, k and v.

    Megatron stores, for each query group, its q query heads, its key head and its value head.
    """
    groups, columns = architecture.num_kv_heads, tensor.shape[1:]
    per_group = architecture.num_heads // groups
    grouped = tensor.view(groups, per_group + 2, architecture.head_dim, *columns)
    parts = (grouped[:, :per_group], grouped[:, per_group], grouped[:, per_group + 1])
    return tuple(part.reshape(-1, *columns) for part in parts)


def _merge_qkv(tensors: tuple[torch.Tensor, ...], architecture: Architecture) -> torch.Tensor:
    columns = tensors[0].shape[1:]
    shape = (architecture.num_kv_heads, -1, architecture.head_dim, *columns)
    return torch.cat([part.view(shape) for part in tensors], dim=1).reshape(-1, *columns)
