"""A Llama's architecture, in Hugging Face's config and in Megatron's arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_let.errors import LETError
from megatron_let.planner.sizes import TransformerSize


@dataclass(frozen=True, kw_only=True)
class Llama(TransformerSize):
    """Sizes and constants of a Llama-family model; `vocab_size` has no padding.

    Attributes:
        max_positions: longest sequence.
        rotary_base: theta of RoPE.
        rope_type: `default`, `linear` (positions divided by `rope_factor`) or `llama3` (Llama 3.1's
            scaling of the low frequencies by `rope_factor`, with Megatron's fixed bounds 1, 4
            and 8192).
        init_std: standard deviation of the initial weights.
    """

    gated: bool = True
    max_positions: int
    norm_epsilon: float
    rotary_base: float = 10000.0
    rope_type: str = "default"
    rope_factor: float = 1.0
    init_std: float = 0.02

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters without padding; a tied embedding counts once."""
        embeddings = self.embedding_params * (1 if self.tied else 2)
        return self.num_layers * self.layer_params + embeddings + self.hidden_size


# Constants of Megatron's `_apply_scaling`; only the factor is an argument.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Megatron argument -> its value in a Llama.
_LLAMA_ARGUMENTS: tuple[tuple[str, Any], ...] = (
    ("normalization", "RMSNorm"),
    ("swiglu", True),
    ("quick_geglu", False),
    ("squared_relu", False),
    ("glu_linear_offset", 0.0),
    ("activation_func_clamp_value", None),
    ("add_bias_linear", False),
    ("add_qkv_bias", False),
    ("position_embedding_type", "rope"),
    ("rotary_percent", 1.0),
    ("rotary_interleaved", False),
    ("qk_layernorm", False),
    ("qk_l2_norm", False),
    ("attention_output_gate", False),
    ("layernorm_zero_centered_gamma", False),
    ("apply_layernorm_1p", False),
    ("apply_residual_connection_post_layernorm", False),
    ("multi_latent_attention", False),
    ("experimental_attention_variant", None),
    ("num_experts", None),
    ("mtp_num_layers", None),
    ("hybrid_layer_pattern", None),
    ("no_rope_freq", None),
    ("window_size", None),
    ("softmax_type", "vanilla"),
    ("use_mup", False),
    ("heterogeneous_layers_config_path", None),
    ("spec", None),
)


def from_megatron(args: Mapping[str, Any], vocab_size: int) -> Llama:
    """Return the architecture that a run's arguments describe.

    Args:
        args: Megatron's arguments, as saved in the checkpoint.
        vocab_size: size of the vocabulary, without padding.

    Raises:
        LETError: the model is not a Llama; names the argument.
    """
    for name, wanted in _LLAMA_ARGUMENTS:
        value = args.get(name, wanted)
        if value != wanted and not (wanted is None and not value):
            raise LETError(
                f"The checkpoint's model is not a Llama: {name} is {value!r}, and a Llama's is"
                f" {wanted!r}; only Llama models can be converted."
            )
    heads = int(args["num_attention_heads"])
    rope_type, factor = _rope_of_megatron(args)
    return Llama(
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
    )


def norm_epsilon(args: Mapping[str, Any]) -> float:
    """Return `--norm-epsilon`, which Megatron saves under one of two names."""
    value = args.get("layernorm_epsilon", args.get("norm_epsilon"))
    return 1e-5 if value is None else float(value)


def _rope_of_megatron(args: Mapping[str, Any]) -> tuple[str, float]:
    if args.get("use_rope_scaling"):
        return "llama3", float(args.get("rope_scaling_factor") or 8.0)
    if args.get("rotary_seq_len_interpolation_factor"):
        return "linear", float(args["rotary_seq_len_interpolation_factor"])
    return "default", 1.0


def to_megatron(llama: Llama) -> dict[str, Any]:
    """Return Megatron's arguments for an architecture."""
    scaled = llama.rope_type == "llama3"
    linear = llama.rope_type == "linear"
    return dict(_LLAMA_ARGUMENTS) | {
        "num_layers": llama.num_layers,
        "hidden_size": llama.hidden_size,
        "ffn_hidden_size": llama.ffn_hidden_size,
        "num_attention_heads": llama.num_heads,
        "group_query_attention": llama.num_kv_heads != llama.num_heads,
        "num_query_groups": llama.num_kv_heads,
        "kv_channels": llama.head_dim,
        "vocab_size": llama.vocab_size,
        "max_position_embeddings": llama.max_positions,
        "untie_embeddings_and_output_weights": not llama.tied,
        "layernorm_epsilon": llama.norm_epsilon,
        "norm_epsilon": llama.norm_epsilon,
        "rotary_base": int(llama.rotary_base),
        "use_rope_scaling": scaled,
        "rope_scaling_factor": llama.rope_factor if scaled else 8.0,
        "rotary_seq_len_interpolation_factor": int(llama.rope_factor) if linear else None,
        "init_method_std": llama.init_std,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
    }


def recipe_settings(llama: Llama) -> dict[str, Any]:
    """Return the `model` section of a recipe for an architecture, in Megatron's flags."""
    settings: dict[str, Any] = {
        "num-layers": llama.num_layers,
        "hidden-size": llama.hidden_size,
        "ffn-hidden-size": llama.ffn_hidden_size,
        "num-attention-heads": llama.num_heads,
    }
    if llama.num_kv_heads != llama.num_heads:
        settings |= {"group-query-attention": True, "num-query-groups": llama.num_kv_heads}
    if llama.head_dim * llama.num_heads != llama.hidden_size:
        settings["kv-channels"] = llama.head_dim
    settings |= {
        "max-position-embeddings": llama.max_positions,
        "normalization": "RMSNorm",
        "norm-epsilon": float(f"{llama.norm_epsilon:.6g}"),
        "swiglu": True,
        "disable-bias-linear": True,
        "position-embedding-type": "rope",
        "rotary-base": int(llama.rotary_base),
    }
    if llama.rope_type == "llama3":
        settings |= {"use-rope-scaling": True, "rope-scaling-factor": llama.rope_factor}
    if llama.rope_type == "linear":
        settings["rotary-seq-len-interpolation-factor"] = int(llama.rope_factor)
    if not llama.tied:
        settings["untie-embeddings-and-output-weights"] = True
    return settings


def from_hugging_face(config: Mapping[str, Any]) -> Llama:
    """Return the architecture in a Llama's `config.json`, of any version of transformers.

    Raises:
        LETError: another architecture, or a setting that Megatron does not support.
    """
    kind = config.get("model_type")
    if kind != "llama":
        raise LETError(
            f"The folder holds a model of type {kind!r}; only Llama models can be"
            " converted (model_type 'llama': SmolLM2, Llama 1 to 3, TinyLlama and similar)."
        )
    if config.get("quantization_config"):
        raise LETError(
            "The model is quantised (quantization_config in config.json); give the full-precision"
            " model."
        )
    for name, wanted in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if config.get(name, wanted) != wanted:
            raise LETError(
                f"The model's {name} is {config[name]!r}; the converter only supports {wanted!r}."
            )
    heads = int(config["num_attention_heads"])
    base, rope_type, factor = _rope_of_hugging_face(config)
    return Llama(
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        ffn_hidden_size=int(config["intermediate_size"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        vocab_size=int(config["vocab_size"]),
        max_positions=int(config.get("max_position_embeddings", 2048)),
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        rotary_base=base,
        rope_type=rope_type,
        rope_factor=factor,
        init_std=float(config.get("initializer_range", 0.02)),
    )


def _rope_of_hugging_face(config: Mapping[str, Any]) -> tuple[float, str, float]:
    # `rope_parameters` since transformers 5; `rope_theta` and `rope_scaling` before.
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    if base != int(base):
        raise LETError(f"The model's rope_theta is {base}; Megatron's --rotary-base is an integer.")
    if kind == "default":
        return base, kind, 1.0
    factor = float(rope.get("factor", 1.0))
    if kind == "linear" and factor == int(factor):
        return base, kind, factor
    if kind == "llama3" and all(rope.get(k) == v for k, v in _LLAMA3_ROPE.items()):
        return base, kind, factor
    raise LETError(
        f"The model's RoPE scaling is {rope}; Megatron supports llama3 with {_LLAMA3_ROPE} and"
        " linear with an integer factor."
    )


def to_hugging_face(llama: Llama, dtype: str) -> dict[str, Any]:
    """Return a `config.json` for transformers 4 and 5.

    Args:
        dtype: torch's name of the weights' type, such as `bfloat16`.
    """
    scaling: dict[str, Any] | None = None
    if llama.rope_type != "default":
        scaling = {"rope_type": llama.rope_type, "factor": llama.rope_factor}
        scaling |= _LLAMA3_ROPE if llama.rope_type == "llama3" else {}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": llama.vocab_size,
        "hidden_size": llama.hidden_size,
        "intermediate_size": llama.ffn_hidden_size,
        "num_hidden_layers": llama.num_layers,
        "num_attention_heads": llama.num_heads,
        "num_key_value_heads": llama.num_kv_heads,
        "head_dim": llama.head_dim,
        "max_position_embeddings": llama.max_positions,
        "tie_word_embeddings": llama.tied,
        "rms_norm_eps": llama.norm_epsilon,
        "rope_theta": llama.rotary_base,
        "rope_scaling": scaling,
        "initializer_range": llama.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) or isinstance(theirs, float):
        return math.isclose(float(ours), float(theirs), rel_tol=1e-5)
    return bool(ours == theirs)


# Field of Llama -> the flag that sets it, for the fields that change what weights compute.
_CHECKED: tuple[tuple[str, str], ...] = (
    ("num_layers", "--num-layers"),
    ("hidden_size", "--hidden-size"),
    ("ffn_hidden_size", "--ffn-hidden-size"),
    ("num_heads", "--num-attention-heads"),
    ("num_kv_heads", "--num-query-groups (with --group-query-attention)"),
    ("head_dim", "--kv-channels"),
    ("tied", "--untie-embeddings-and-output-weights"),
    ("norm_epsilon", "--norm-epsilon"),
    ("rotary_base", "--rotary-base"),
    ("rope_type", "--use-rope-scaling"),
    ("rope_factor", "--rope-scaling-factor"),
)


def first_difference(run: Llama, checkpoint: Llama) -> tuple[str, Any, Any] | None:
    """Return the first flag whose value differs and changes the outputs.

    Returns:
        Flag, the run's value, the checkpoint's value; None if there is no difference.
    """

    def value(llama: Llama, name: str) -> Any:
        # The flag is the opposite of the field.
        return not llama.tied if name == "tied" else getattr(llama, name)

    for name, flag in _CHECKED:
        ours, theirs = value(run, name), value(checkpoint, name)
        if not _same(ours, theirs):
            return flag, ours, theirs
    return None
