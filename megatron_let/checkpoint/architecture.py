"""An architecture that is converted, and Megatron's arguments for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_let.config.megatron_arguments import APPLIES_ROPE_FACTOR
from megatron_let.errors import LETError
from megatron_let.planner.sizes import TransformerSize


@dataclass(frozen=True, kw_only=True)
class Architecture(TransformerSize):
    """Sizes and constants of a decoder with RMSNorm, RoPE and SwiGLU; `vocab_size` has no padding.

    Attributes:
        max_positions: longest sequence.
        rotary_base: theta of RoPE.
        rope_type: `default`, `linear` (positions divided by `rope_factor`) or `llama3` (Llama 3.1's
            scaling of the low frequencies by `rope_factor`, with Megatron's fixed bounds 1, 4
            and 8192).
        init_std: standard deviation of the initial weights.
        qkv_bias: the projections to queries, keys and values have biases.
        qk_norm: RMSNorm of each head's queries and keys, before RoPE.
        num_experts: experts of a layer; 0 in a dense model, where the fields below have no meaning.
        experts_per_token: experts that a token is routed to, by a softmax over their logits.
        normalized_routing: the weights of a token's experts sum to 1.
        expert_ffn_hidden_size: width of one expert; `ffn_hidden_size` is that of a dense layer.
        dense_layers: 0-based numbers of the layers without experts.
        shared_ffn_hidden_size: width of the gated shared expert; 0 without one.
        aux_loss_coeff: coefficient of the load balancing loss, which no output depends on.
    """

    gated: bool = True
    max_positions: int
    norm_epsilon: float
    rotary_base: float = 10000.0
    rope_type: str = "default"
    rope_factor: float = 1.0
    init_std: float = 0.02
    qkv_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    normalized_routing: bool = True
    expert_ffn_hidden_size: int = 0
    dense_layers: tuple[int, ...] = ()
    shared_ffn_hidden_size: int = 0
    aux_loss_coeff: float = 0.0

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer (0-based) is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers


# The only value of Megatron's arguments that every architecture of the converter has.
_FIXED_ARGUMENTS: tuple[tuple[str, Any], ...] = (
    ("normalization", "RMSNorm"),
    ("swiglu", True),
    ("quick_geglu", False),
    ("squared_relu", False),
    ("glu_linear_offset", 0.0),
    ("activation_func_clamp_value", None),
    ("add_bias_linear", False),
    ("position_embedding_type", "rope"),
    ("rotary_percent", 1.0),
    ("rotary_interleaved", False),
    ("qk_l2_norm", False),
    ("attention_output_gate", False),
    ("layernorm_zero_centered_gamma", False),
    ("apply_layernorm_1p", False),
    ("apply_residual_connection_post_layernorm", False),
    ("multi_latent_attention", False),
    ("experimental_attention_variant", None),
    ("mtp_num_layers", None),
    ("hybrid_layer_pattern", None),
    ("no_rope_freq", None),
    ("window_size", None),
    ("softmax_type", "vanilla"),
    ("use_mup", False),
    ("heterogeneous_layers_config_path", None),
    ("spec", None),
)
# The same for a mixture of experts.
_FIXED_EXPERT_ARGUMENTS: tuple[tuple[str, Any], ...] = (
    ("moe_router_score_function", "softmax"),
    ("moe_router_enable_expert_bias", False),
    ("moe_router_num_groups", None),
    ("moe_router_group_topk", None),
    ("moe_router_topk_limited_devices", None),
    ("moe_router_topk_scaling_factor", None),
    ("moe_router_force_load_balancing", False),
    ("moe_router_force_biased", None),
    ("moe_input_jitter_eps", None),
    ("moe_expert_capacity_factor", None),
    ("moe_apply_probs_on_input", False),
    ("moe_latent_size", None),
    ("moe_mlp_glu_interleave_size", None),
    ("moe_shared_expert_glu_interleave_size", None),
)
# Routing that depends on more than a token's own logits.
_BALANCED_ROUTING = ("sinkhorn", "quantile_balancing")
_STOCK_ROPE_FACTOR = 8.0


def from_megatron(args: Mapping[str, Any], vocab_size: int) -> Architecture:
    """Return the architecture that a run's arguments describe.

    Args:
        vocab_size: size of the vocabulary, without padding.

    Raises:
        LETError: the converter has no such architecture; names the argument.
    """
    _check_fixed(args, _FIXED_ARGUMENTS)
    heads = int(args["num_attention_heads"])
    rope_type, factor = _rope_of_megatron(args)
    return Architecture(
        num_layers=int(args["num_layers"]),
        hidden_size=int(args["hidden_size"]),
        ffn_hidden_size=int(args["ffn_hidden_size"]),
        num_heads=heads,
        # Without group-query attention Megatron's parser leaves it at 1.
        num_kv_heads=int(args["num_query_groups"]) if args.get("group_query_attention") else heads,
        head_dim=int(args.get("kv_channels") or args["hidden_size"] // heads),
        vocab_size=vocab_size,
        max_positions=int(args.get("max_position_embeddings") or args["seq_length"]),
        tied=not args.get("untie_embeddings_and_output_weights", False),
        norm_epsilon=norm_epsilon(args),
        rotary_base=float(args.get("rotary_base") or 10000),
        rope_type=rope_type,
        rope_factor=factor,
        init_std=float(args.get("init_method_std") or 0.02),
        qkv_bias=bool(args.get("add_qkv_bias")),
        qk_norm=bool(args.get("qk_layernorm")),
        **_experts_of_megatron(args),
    )


def _check_fixed(args: Mapping[str, Any], fixed: tuple[tuple[str, Any], ...]) -> None:
    for name, wanted in fixed:
        value = args.get(name, wanted)
        if value != wanted and not (wanted is None and not value):
            _refuse(name, value, repr(wanted))


def _refuse(name: str, value: Any, wanted: str) -> None:
    raise LETError(
        f"The checkpoint's model is not a Llama, Qwen or Mixtral: {name} is {value!r}, and theirs"
        f" is {wanted}; no other model can be converted."
    )


def _experts_of_megatron(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a mixture of experts; none of a dense model."""
    if not args.get("num_experts"):
        return {}
    _check_fixed(args, _FIXED_EXPERT_ARGUMENTS)
    balancing = args.get("moe_router_load_balancing_type", "aux_loss")
    if any(kind in _BALANCED_ROUTING for kind in _as_list(balancing)):
        _refuse("moe_router_load_balancing_type", balancing, "aux_loss, seq_aux_loss or none")
    shared = int(args.get("moe_shared_expert_intermediate_size") or 0)
    if shared and not args.get("moe_shared_expert_gate"):
        _refuse("moe_shared_expert_gate", False, "True where they have a shared expert")
    coefficient = args.get("moe_aux_loss_coeff")
    has_aux_loss = balancing == "aux_loss" and isinstance(coefficient, float)
    return {
        "num_experts": int(args["num_experts"]),
        "experts_per_token": int(args.get("moe_router_topk") or 2),
        "normalized_routing": not args.get("moe_router_pre_softmax", False),
        "expert_ffn_hidden_size": int(args.get("moe_ffn_hidden_size") or args["ffn_hidden_size"]),
        "dense_layers": _dense_layers(args.get("moe_layer_freq", 1), int(args["num_layers"])),
        "shared_ffn_hidden_size": shared,
        "aux_loss_coeff": float(coefficient) if has_aux_loss and coefficient else 0.0,
    }


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _dense_layers(frequency: int | list[int], num_layers: int) -> tuple[int, ...]:
    """Return the 0-based layers without experts of `--moe-layer-freq`."""
    if isinstance(frequency, int):
        return tuple(layer for layer in range(num_layers) if layer % frequency)
    return tuple(layer for layer, has_experts in enumerate(frequency) if not has_experts)


def norm_epsilon(args: Mapping[str, Any]) -> float:
    """Return `--norm-epsilon`, which Megatron saves under one of two names."""
    value = args.get("layernorm_epsilon", args.get("norm_epsilon"))
    return 1e-5 if value is None else float(value)


def _rope_of_megatron(args: Mapping[str, Any]) -> tuple[str, float]:
    interpolation = args.get("rotary_seq_len_interpolation_factor")
    if args.get("use_rope_scaling"):
        if interpolation:
            name = "rotary_seq_len_interpolation_factor"
            _refuse(name, interpolation, "None with use_rope_scaling")
        return "llama3", rope_scaling_factor(args)
    if interpolation:
        return "linear", float(interpolation)
    return "default", 1.0


def rope_scaling_factor(args: Mapping[str, Any]) -> float:
    """Return the factor of `--use-rope-scaling` that the weights were trained with."""
    if ignored_rope_factor(args) is not None:
        return _STOCK_ROPE_FACTOR
    return float(args.get("rope_scaling_factor") or _STOCK_ROPE_FACTOR)


def ignored_rope_factor(args: Mapping[str, Any]) -> float | None:
    """Return a `--rope-scaling-factor` that the run did not apply; None if there is none.

    Megatron 0.19's `gpt_config_from_args` does not pass it on. This package's entry does and marks
    its arguments; a converted checkpoint, which has no `train_iters`, has the model's factor.
    """
    factor = args.get("rope_scaling_factor")
    is_ignored = "train_iters" in args and not args.get(APPLIES_ROPE_FACTOR)
    if not args.get("use_rope_scaling") or not is_ignored or factor in (None, _STOCK_ROPE_FACTOR):
        return None
    return float(factor)


def to_megatron(architecture: Architecture) -> dict[str, Any]:
    """Return Megatron's arguments for an architecture."""
    scaled = architecture.rope_type == "llama3"
    linear = architecture.rope_type == "linear"
    return (
        dict(_FIXED_ARGUMENTS)
        | _experts_to_megatron(architecture)
        | {
            "num_layers": architecture.num_layers,
            "hidden_size": architecture.hidden_size,
            "ffn_hidden_size": architecture.ffn_hidden_size,
            "num_attention_heads": architecture.num_heads,
            "group_query_attention": architecture.num_kv_heads != architecture.num_heads,
            "num_query_groups": architecture.num_kv_heads,
            "kv_channels": architecture.head_dim,
            "vocab_size": architecture.vocab_size,
            "max_position_embeddings": architecture.max_positions,
            "untie_embeddings_and_output_weights": not architecture.tied,
            "layernorm_epsilon": architecture.norm_epsilon,
            "norm_epsilon": architecture.norm_epsilon,
            "rotary_base": int(architecture.rotary_base),
            "use_rope_scaling": scaled,
            "rope_scaling_factor": architecture.rope_factor if scaled else _STOCK_ROPE_FACTOR,
            "rotary_seq_len_interpolation_factor": int(architecture.rope_factor)
            if linear
            else None,
            "init_method_std": architecture.init_std,
            "add_qkv_bias": architecture.qkv_bias,
            "qk_layernorm": architecture.qk_norm,
            "add_position_embedding": True,
            "use_rotary_position_embeddings": False,
        }
    )


def _experts_to_megatron(architecture: Architecture) -> dict[str, Any]:
    if not architecture.num_experts:
        return {"num_experts": None}
    layers = range(architecture.num_layers)
    return dict(_FIXED_EXPERT_ARGUMENTS) | {
        "num_experts": architecture.num_experts,
        "moe_router_topk": architecture.experts_per_token,
        "moe_router_pre_softmax": not architecture.normalized_routing,
        "moe_ffn_hidden_size": architecture.expert_ffn_hidden_size,
        # With a list, each layer has its own names in checkpoints.
        "moe_layer_freq": [int(architecture.has_experts(layer)) for layer in layers]
        if architecture.dense_layers
        else 1,
        "moe_shared_expert_intermediate_size": architecture.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": architecture.shared_ffn_hidden_size > 0,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": architecture.aux_loss_coeff,
    }


# Arguments that a recipe gives wherever they are not 0, off or None.
_RECIPE_ARGUMENTS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
    *("max_position_embeddings", "normalization", "swiglu", "position_embedding_type"),
    *("rotary_base", "rotary_seq_len_interpolation_factor", "add_qkv_bias", "qk_layernorm"),
    "untie_embeddings_and_output_weights",
)


def recipe_settings(architecture: Architecture) -> dict[str, Any]:
    """Return the `model` section of a recipe for an architecture, in Megatron's flags."""
    args = to_megatron(architecture)
    names = [*_RECIPE_ARGUMENTS, *_experts_to_megatron(architecture)]
    if args["group_query_attention"]:
        names += ["group_query_attention", "num_query_groups"]
    if args["use_rope_scaling"]:
        names += ["use_rope_scaling", "rope_scaling_factor"]
    if architecture.head_dim * architecture.num_heads != architecture.hidden_size:
        names.append("kv_channels")
    fixed = dict(_FIXED_EXPERT_ARGUMENTS)
    settings = {n.replace("_", "-"): args[n] for n in names if n not in fixed and args[n]}
    if architecture.dense_layers:
        settings["moe-layer-freq"] = str(args["moe_layer_freq"]).replace(" ", "")
    else:
        settings.pop("moe-layer-freq", None)  # 1, the default
    epsilon = float(f"{architecture.norm_epsilon:.6g}")
    # Megatron's default is a dropout of 0.1.
    no_dropout = {"attention-dropout": 0.0, "hidden-dropout": 0.0}
    return settings | no_dropout | {"norm-epsilon": epsilon, "disable-bias-linear": True}
