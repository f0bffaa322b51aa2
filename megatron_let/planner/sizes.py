"""Sizes of transformers, with their parameters and FLOPs, and of GPUs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_let.config.arguments import flag, padded_vocab_size
from megatron_let.errors import LETError


@dataclass(frozen=True)
class Experts:
    """The experts that replace the MLP of every layer.

    Attributes:
        num_experts: routed experts.
        topk: routed experts per token.
        ffn_hidden_size: of one routed expert.
        shared_ffn_hidden_size: of the shared experts together; 0 for none.
    """

    num_experts: int
    topk: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int = 0


@dataclass(frozen=True)
class TransformerSize:
    """Sizes of a decoder-only transformer.

    Attributes:
        num_kv_heads: key and value heads (query groups).
        head_dim: width of one attention head.
        gated: the MLP is gated (SwiGLU): three matrices instead of two.
        vocab_size: rows of the embedding, padding included.
        tied: the output layer is the embedding.
        num_bytes: bytes of one weight or activation of a teacher: 2 for bf16, 4 for fp32.
        qk_norm: queries and keys are normalised per head.
        experts: of a mixture of experts, instead of the MLP; None for a dense transformer.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gated: bool
    vocab_size: int
    tied: bool = False
    num_bytes: int = 2
    qk_norm: bool = False
    experts: Experts | None = None

    @property
    def layer_params(self) -> int:
        """Return the parameters of one layer, including its norms and all experts."""
        return self.dense_layer_params + self.expert_layer_params

    @property
    def dense_layer_params(self) -> int:
        """Return the parameters of one layer without routed experts."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        if self.experts is None:
            return attention + norms + self._mlp_params(self.ffn_hidden_size)
        router = self.experts.num_experts * self.hidden_size
        shared = self._mlp_params(self.experts.shared_ffn_hidden_size)
        return attention + norms + router + shared

    @property
    def expert_layer_params(self) -> int:
        """Return the parameters of one layer's routed experts."""
        if self.experts is None:
            return 0
        return self.experts.num_experts * self._mlp_params(self.experts.ffn_hidden_size)

    @property
    def active_layer_params(self) -> int:
        """Return the parameters of one layer that a token passes."""
        if self.experts is None:
            return self.dense_layer_params
        routed = self.experts.topk * self._mlp_params(self.experts.ffn_hidden_size)
        return self.dense_layer_params + routed

    @property
    def num_params(self) -> int:
        """Return all parameters but the final norm."""
        return self.num_layers * self.layer_params + self._vocabulary_params

    @property
    def num_active_params(self) -> int:
        """Return the parameters that a token passes, embedding and output layer included."""
        return self.num_layers * self.active_layer_params + self._vocabulary_params

    @property
    def _vocabulary_params(self) -> int:
        return self.embedding_params * (1 if self.tied else 2)

    def _mlp_params(self, ffn_hidden_size: int) -> int:
        return (3 if self.gated else 2) * self.hidden_size * ffn_hidden_size

    @property
    def largest_matrix(self) -> int:
        """Return the parameters of a layer's largest matrix."""
        heads = self.num_heads + 2 * self.num_kv_heads
        mlp = (2 if self.gated else 1) * self.ffn_hidden_size
        return self.hidden_size * max(heads * self.head_dim, mlp)

    @property
    def embedding_params(self) -> int:
        """Return the parameters of the embedding, or of an untied output layer."""
        return self.vocab_size * self.hidden_size

    def layer_forward_flops(self, seq_length: int) -> int:
        """Return FLOPs of one layer per token, with the full attention matrix (not causal)."""
        scores = 4 * seq_length * self.num_heads * self.head_dim
        return 2 * self.active_layer_params + scores

    @property
    def logits_forward_flops(self) -> int:
        """Return the FLOPs of the output layer per token."""
        return 2 * self.embedding_params

    def forward_flops(self, seq_length: int, logits: bool) -> int:
        """Return FLOPs of all layers per token."""
        layers = self.num_layers * self.layer_forward_flops(seq_length)
        return layers + (self.logits_forward_flops if logits else 0)


@dataclass(frozen=True)
class Gpu:
    """A GPU and its interconnects.

    Attributes:
        memory: bytes that the driver offers.
        flops: dense bf16 FLOP/s, from the data sheet.
        fp32_flops: fp32 FLOP/s without TF32, which neither Megatron nor this package enables.
        link: bytes/s within a node, one way.
        network: bytes/s between nodes, per GPU.
    """

    memory: int
    flops: float
    link: float
    network: float
    fp32_flops: float


GPUS = {
    "a100-40g": Gpu(int(39.4 * 2**30), 312e12, 300e9, 25e9, 19.5e12),
    "a100-80g": Gpu(int(79.1 * 2**30), 312e12, 300e9, 25e9, 19.5e12),
    "h100-80g": Gpu(int(79.1 * 2**30), 989e12, 450e9, 50e9, 67e12),
    "h200-141g": Gpu(int(139.8 * 2**30), 989e12, 450e9, 50e9, 67e12),
}

# Arguments whose parameters, memory or FLOPs the planner does not count.
_NOT_COUNTED = (
    *("use_megatron_fsdp", "use_torch_fsdp2", "grad_reduce_in_bf16", "optimizer_cpu_offload"),
    "use_precision_aware_optimizer",
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    *("multi_latent_attention", "mtp_num_layers", "attention_output_gate"),
    *("hybrid_layer_pattern", "moe_latent_size", "moe_expert_capacity_factor"),
    *("moe_shared_expert_gate", "moe_apply_probs_on_input"),
)

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

# Teachers of the paper and of this repository, to plan without their files.
TEACHERS = {
    "smollm2-135m": TransformerSize(30, 576, 1536, 9, 3, 64, True, 49152, True),
    "smollm2-1.7b": TransformerSize(24, 2048, 8192, 32, 32, 64, True, 49152, True),
    "llama-3.2-1b": TransformerSize(16, 2048, 8192, 32, 8, 64, True, 128256, True),
    "llama-3.1-8b": TransformerSize(32, 4096, 14336, 32, 8, 128, True, 128256, False),
    "opt-125m": TransformerSize(12, 768, 3072, 12, 12, 64, False, 50272, True),
    "pythia-160m": TransformerSize(12, 768, 3072, 12, 12, 64, False, 50304, False),
}


def teacher_size(name: str) -> TransformerSize:
    """Return the sizes of a name in `TEACHERS` or of a Hugging Face folder.

    Raises:
        LETError: it is neither.
    """
    if name.lower() in TEACHERS:
        return TEACHERS[name.lower()]
    if not (Path(name) / "config.json").is_file():
        raise LETError(
            f"The teacher {name} is neither a model folder nor one of {', '.join(TEACHERS)}; give"
            " --teacher one of them."
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    config = config.get_text_config()
    heads, hidden = config.num_attention_heads, config.hidden_size
    inner = (getattr(config, key, None) for key in ("intermediate_size", "ffn_dim", "n_inner"))
    return TransformerSize(
        num_layers=config.num_hidden_layers,
        hidden_size=hidden,
        ffn_hidden_size=next((size for size in inner if size), 4 * hidden),
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        gated=getattr(config, "hidden_act", "") == "silu" or "gemma" in config.model_type,
        vocab_size=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        experts=_experts_of_config(config),
    )


def _experts_of_config(config: Any) -> Experts | None:
    """Return the experts in a model's config, as if every layer had them; None if it is dense."""
    counts = (getattr(config, name, None) for name in _EXPERT_COUNTS)
    num_experts = next(filter(None, counts), 0)
    if num_experts < 2 or not getattr(config, "is_moe", True):
        return None
    return Experts(
        num_experts=num_experts,
        topk=getattr(config, "num_experts_per_tok", None) or 1,
        ffn_hidden_size=getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        shared_ffn_hidden_size=getattr(config, "shared_expert_intermediate_size", None) or 0,
    )


def student_size(args: argparse.Namespace, vocab_size: int, tp: int) -> TransformerSize:
    """Return the sizes in Megatron's arguments, with the vocabulary padded as Megatron does.

    Raises:
        LETError: the planner does not count this model.
    """
    found = {name: value for name in _NOT_COUNTED if (value := getattr(args, name))}
    if args.num_distributed_optimizer_instances > 1:
        found["num_distributed_optimizer_instances"] = args.num_distributed_optimizer_instances
    group = args.microbatch_group_size_per_vp_stage
    if group not in (None, args.pipeline_model_parallel_size):
        found["microbatch_group_size_per_virtual_pipeline_stage"] = group
    for name, value in found.items():
        raise LETError(
            f"The planner does not count the memory and time of {flag(name)} {value}; measure a"
            " few steps of the run instead."
        )
    heads, hidden = args.num_attention_heads, args.hidden_size
    default = int(4 * hidden * 2 / 3) // 64 * 64 if args.swiglu else 4 * hidden
    ffn_hidden_size = args.ffn_hidden_size or default
    return TransformerSize(
        num_layers=args.num_layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn_hidden_size,
        num_heads=heads,
        num_kv_heads=args.num_query_groups if args.group_query_attention else heads,
        head_dim=args.kv_channels or hidden // heads,
        gated=args.swiglu,
        vocab_size=padded_vocab_size(vocab_size, args.make_vocab_size_divisible_by, tp),
        tied=not args.untie_embeddings_and_output_weights,
        qk_norm=args.qk_layernorm,
        experts=_experts(args, ffn_hidden_size),
    )


def _experts(args: argparse.Namespace, ffn_hidden_size: int) -> Experts | None:
    """Return the experts in Megatron's arguments; None if the model is dense."""
    if not args.num_experts:
        return None
    for name, counted in (("moe_layer_freq", 1), ("moe_token_dispatcher_type", "alltoall")):
        if (value := getattr(args, name)) != counted:
            raise LETError(
                f"The planner counts mixtures of experts with {flag(name)} {counted} only, and the"
                f" run has {value}; measure a few steps of the run instead."
            )
    return Experts(
        num_experts=args.num_experts,
        topk=args.moe_router_topk,
        ffn_hidden_size=args.moe_ffn_hidden_size or ffn_hidden_size,
        shared_ffn_hidden_size=args.moe_shared_expert_intermediate_size or 0,
    )
