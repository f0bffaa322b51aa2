"""The architectures of transformers that are converted: their config and names."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_let.checkpoint.architecture import Architecture
from megatron_let.errors import LETError, first_line


@dataclass(frozen=True)
class ModelType:
    """One architecture of transformers.

    Attributes:
        name: `model_type` in `config.json`.
        class_name: class of the causal language model.
        qkv_bias: whether it has these biases; both, if its config has a field for them.
        qk_norm, has_experts, has_shared_expert: the parts that every model of the type has.
        has_layer_types: whether `layer_types` decides where the window applies.
        fixed: field of the config -> the only value that Megatron supports.
        num_experts: field of the config with the number of experts.
        experts: module of a mixture of experts in a layer.
        gate, up, down: names of an expert's matrices.
    """

    name: str
    class_name: str
    qkv_bias: tuple[bool, ...] = (False,)
    qk_norm: bool = False
    has_experts: bool = False
    has_shared_expert: bool = False
    has_layer_types: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    num_experts: str = "num_experts"
    experts: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


MODEL_TYPES = (
    ModelType(
        "llama", "LlamaForCausalLM", fixed={"attention_bias": False, "mlp_bias": False}
    ),
    ModelType("qwen2", "Qwen2ForCausalLM", qkv_bias=(True,), has_layer_types=True),
    # Its attention_bias would also be one of the output projection.
    ModelType(
        "qwen3", "Qwen3ForCausalLM", qk_norm=True, has_layer_types=True,
        fixed={"attention_bias": False},
    ),
    ModelType(
        "mixtral", "MixtralForCausalLM", has_experts=True, fixed={"router_jitter_noise": 0.0},
        num_experts="num_local_experts", experts="block_sparse_moe", gate="w1", up="w3", down="w2",
    ),
    ModelType(
        "qwen2_moe", "Qwen2MoeForCausalLM", qkv_bias=(True, False), has_experts=True,
        has_shared_expert=True, has_layer_types=True,
    ),
    ModelType(
        "qwen3_moe", "Qwen3MoeForCausalLM", qk_norm=True, has_experts=True,
        fixed={"attention_bias": False},
    ),
)  # fmt: skip
_BY_NAME = {kind.name: kind for kind in MODEL_TYPES}
# Constants of Megatron's `_apply_scaling`; only the factor is an argument.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def model_type_of(architecture: Architecture) -> ModelType:
    """Return the architecture of transformers that has all parts of a model.

    Raises:
        LETError: none has; names Megatron's arguments.
    """
    has_experts, shared = architecture.num_experts > 0, architecture.shared_ffn_hidden_size
    for kind in MODEL_TYPES:
        same_experts = (kind.has_experts, kind.has_shared_expert) == (has_experts, shared > 0)
        same_norm = kind.qk_norm == architecture.qk_norm
        if same_experts and same_norm and architecture.qkv_bias in kind.qkv_bias:
            _check_experts(kind, architecture)
            return kind
    raise LETError(
        "No architecture of transformers that the converter knows"
        f" ({', '.join(_BY_NAME)}) has all of add_qkv_bias {architecture.qkv_bias}, qk_layernorm"
        f" {architecture.qk_norm}, num_experts {architecture.num_experts or None} and"
        f" moe_shared_expert_intermediate_size {shared or None}."
    )


def _check_experts(kind: ModelType, architecture: Architecture) -> None:
    """Check what a type's config, or Megatron's router, cannot express."""
    if len(architecture.dense_layers) == architecture.num_layers:
        raise LETError("No layer of the model has experts (moe_layer_freq, mlp_only_layers).")
    if kind.name == "mixtral" and architecture.dense_layers:
        raise LETError(
            f"The layers {architecture.dense_layers} have no experts (moe_layer_freq), and all"
            " layers of a Mixtral have; no other architecture without q/k norms is converted."
        )
    if kind.name == "mixtral" and not architecture.normalized_routing:
        raise LETError(
            "The weights of a token's experts do not sum to 1 (moe_router_pre_softmax), and a"
            " Mixtral's do; no other architecture without q/k norms is converted."
        )
    if architecture.experts_per_token == 1 and architecture.normalized_routing:
        raise LETError(
            "Each token has one expert with weight 1 (num_experts_per_tok is 1, and the weights"
            " are normalised); Megatron's router gives one expert its probability as weight."
        )


def from_hugging_face(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture in a `config.json`, of any version of transformers.

    transformers' own class reads it: it has the defaults, the earlier names, and the rules that
    other fields follow from.

    Raises:
        LETError: another architecture, or a setting that Megatron does not support.
    """
    kind = _BY_NAME.get(str(config.get("model_type")))
    if kind is None:
        raise LETError(
            f"The folder holds a model of type {config.get('model_type')!r}; the converter has"
            f" {', '.join(_BY_NAME)} (SmolLM2 and TinyLlama, for example, are of type 'llama')."
        )
    if config.get("quantization_config"):
        raise LETError(
            "The model is quantised (quantization_config in config.json); give the full-precision"
            " model."
        )
    read = _read(kind, config)
    _check_fixed(kind, read)
    heads = int(read["num_attention_heads"])
    base, rope_type, factor = _rope(read["rope_parameters"])
    architecture = Architecture(
        num_layers=int(read["num_hidden_layers"]),
        hidden_size=int(read["hidden_size"]),
        ffn_hidden_size=int(read["intermediate_size"]),
        num_heads=heads,
        num_kv_heads=int(read["num_key_value_heads"]),
        head_dim=int(read.get("head_dim") or read["hidden_size"] // heads),
        vocab_size=int(read["vocab_size"]),
        max_positions=int(read["max_position_embeddings"]),
        tied=bool(read["tie_word_embeddings"]),
        norm_epsilon=float(read["rms_norm_eps"]),
        rotary_base=base,
        rope_type=rope_type,
        rope_factor=factor,
        init_std=float(read["initializer_range"]),
        qkv_bias=bool(read.get("qkv_bias", kind.qkv_bias[0])),
        qk_norm=kind.qk_norm,
        **(_experts(kind, read) if kind.has_experts else {}),
    )
    _check_experts(kind, architecture)
    return architecture


def _read(kind: ModelType, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return all fields of a config under the names of this version of transformers."""
    try:
        read = CONFIG_MAPPING[kind.name](**copy.deepcopy(dict(config)))
    except Exception as error:  # transformers raises many types for a field that is not valid
        raise LETError(
            f"transformers cannot read the model's config.json ({first_line(error)})."
        ) from error
    # As the model does when it is built: a field outside of rope_parameters has precedence.
    read.standardize_rope_params()
    fields: dict[str, Any] = read.to_dict()
    if kind.has_experts:
        # Qwen3-MoE's field has another name since transformers 5.
        fields[kind.num_experts] = getattr(read, kind.num_experts)
    return fields


def _check_fixed(kind: ModelType, read: Mapping[str, Any]) -> None:
    """Check the settings that have one supported value.

    Raises:
        LETError: names the field, its value and the supported one.
    """
    layers = read.get("layer_types")
    fixed = {"hidden_act": "silu", "is_causal": True, "per_layer_config": None, **kind.fixed}
    if layers is None or not kind.has_layer_types:
        fixed["sliding_window"] = None
    if layers is not None and any(layer != "full_attention" for layer in layers):
        raise LETError(
            f"The model's layer_types are {sorted(set(layers))} (sliding_window"
            f" {read.get('sliding_window')}); the converter only supports full_attention."
        )
    for name, wanted in fixed.items():
        value = read.get(name, wanted)
        if value != wanted:
            raise LETError(
                f"The model's {name} is {value!r}; the converter only supports {wanted!r}."
            )


def _experts(kind: ModelType, read: Mapping[str, Any]) -> dict[str, Any]:
    layers, step = range(int(read["num_hidden_layers"])), read.get("decoder_sparse_step", 1)
    dense = set(read.get("mlp_only_layers") or ())
    return {
        "num_experts": int(read[kind.num_experts]),
        "experts_per_token": int(read["num_experts_per_tok"]),
        "normalized_routing": bool(read.get("norm_topk_prob", True)),
        "expert_ffn_hidden_size": int(
            read.get("moe_intermediate_size") or read["intermediate_size"]
        ),
        "dense_layers": tuple(i for i in layers if i in dense or (i + 1) % step),
        "shared_ffn_hidden_size": int(read.get("shared_expert_intermediate_size") or 0),
        "aux_loss_coeff": float(read["router_aux_loss_coef"]),
    }


def _rope(rope: Mapping[str, Any]) -> tuple[float, str, float]:
    """Return RoPE's base, type and factor."""
    kind, base = str(rope.get("rope_type")), float(rope.get("rope_theta") or 0.0)
    factor = float(rope.get("factor", 1.0))
    if kind in ("default", "linear", "llama3") and base != int(base):
        raise LETError(f"The model's rope_theta is {base}; Megatron's --rotary-base is an integer.")
    supported = {
        "default": True,
        "linear": factor == int(factor),
        "llama3": all(rope.get(name) == value for name, value in _LLAMA3_ROPE.items()),
    }
    if not supported.get(kind) or rope.get("partial_rotary_factor") not in (None, 1.0):
        raise LETError(
            f"The model's RoPE is {dict(rope)}; Megatron supports the default, llama3 with"
            f" {_LLAMA3_ROPE} and linear with an integer factor, over the whole head."
        )
    return base, kind, 1.0 if kind == "default" else factor


def to_hugging_face(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """Return a `config.json` for transformers 4 and 5.

    Args:
        dtype: torch's name of the weights' type, such as `bfloat16`.
    """
    kind = model_type_of(architecture)
    scaling: dict[str, Any] | None = None
    if architecture.rope_type != "default":
        scaling = {"rope_type": architecture.rope_type, "factor": architecture.rope_factor}
        scaling |= _LLAMA3_ROPE if architecture.rope_type == "llama3" else {}
    config = {
        "architectures": [kind.class_name],
        "model_type": kind.name,
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_heads,
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "max_position_embeddings": architecture.max_positions,
        "tie_word_embeddings": architecture.tied,
        "rms_norm_eps": architecture.norm_epsilon,
        "rope_theta": architecture.rotary_base,
        "rope_scaling": scaling,
        "initializer_range": architecture.init_std,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        **kind.fixed,
    }
    if kind.name != "llama":
        config["sliding_window"] = None
    if kind.name.startswith("qwen"):
        config["use_sliding_window"] = False
    return config | _experts_config(kind, architecture)


def _experts_config(kind: ModelType, architecture: Architecture) -> dict[str, Any]:
    if not kind.has_experts:
        return {}
    config: dict[str, Any] = {
        kind.num_experts: architecture.num_experts,
        "num_experts_per_tok": architecture.experts_per_token,
        "router_aux_loss_coef": architecture.aux_loss_coeff,
        "output_router_logits": False,
    }
    if kind.name == "mixtral":
        return config | {"intermediate_size": architecture.expert_ffn_hidden_size}
    config |= {
        "moe_intermediate_size": architecture.expert_ffn_hidden_size,
        "norm_topk_prob": architecture.normalized_routing,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(architecture.dense_layers),
    }
    if kind.has_shared_expert:
        config |= {
            "shared_expert_intermediate_size": architecture.shared_ffn_hidden_size,
            "qkv_bias": architecture.qkv_bias,
        }
    return config
