"""GPT layer spec of torch modules, for hosts without Transformer Engine.

Megatron's local spec supports neither sequence parallelism in its norm nor context parallelism in
its attention, and materialises [b, heads, s, s] scores. The two modules here lift these limits.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models import GPTModelConfig

from megatron_let.config.arguments import flag
from megatron_let.config.megatron_arguments import read_lists
from megatron_let.errors import LETError


class RMSNorm(torch.nn.Module):
    """RMSNorm by torch, with sequence parallelism; takes the parameters of Megatron's norms.

    Maps [s, b, h], or [s/tp, b, h] under sequence parallelism, to the same shape.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads sums the gradient of marked parameters over the TP ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


def zigzag_positions(local_length: int, cp_size: int, device: torch.device) -> torch.Tensor:
    """Return the global positions of all CP ranks' tokens, in all-gather order.

    Rank r holds the chunks r and 2*cp-1-r of 2*cp equal chunks (Megatron's load balancing).

    Returns:
        [local_length * cp_size] int64.
    """
    chunk = torch.arange(local_length // 2, device=device)
    starts = [
        index * (local_length // 2)
        for rank in range(cp_size)
        for index in (rank, 2 * cp_size - 1 - rank)
    ]
    return torch.cat([chunk + start for start in starts])


class SDPAttention(MegatronModule):
    """Causal core attention by torch's `scaled_dot_product_attention`, with context parallelism.

    With CP > 1, K and V are gathered over the context-parallel group ([s, b, groups, d]) and the
    mask follows the zigzag order of the shards. A data set's mask replaces the causal one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"SDPAttention is causal only, not {attn_mask_type}.")
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cp_group = (
            pg_collection.cp
            if pg_collection is not None
            else parallel_state.get_context_parallel_group()
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Return the attention output [s, b, heads/tp * d].

        Args:
            query: [s, b, heads/tp, d].
            key, value: [s, b, groups/tp, d].
            attention_mask: [b, 1, s, sequence length] bool, true where a token is not attended to,
                with keys in the order of the sequence; None for causal attention.
            attn_mask_type: as in Megatron's core attention.
            attention_bias, packed_seq_params: must be None.

        Raises:
            ValueError: a bias or packed sequences are given.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError("Packed sequences and attention bias need Transformer Engine.")
        mask = None if attention_mask is None else ~attention_mask
        if self.cp_group.size() > 1:
            positions = zigzag_positions(query.shape[0], self.cp_group.size(), query.device)
            key, value = self._gather(key), self._gather(value)
            local = positions.view(self.cp_group.size(), -1)[self.cp_group.rank()]
            causal = local[:, None] >= positions[None, :]
            mask = causal if mask is None else mask[..., positions]
        dropout = self.dropout if self.training else 0.0
        with self._dropout_generator(dropout):
            context = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=self.softmax_scale,
                enable_gqa=key.shape[2] != query.shape[2],
            )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _dropout_generator(self, dropout: float) -> contextlib.AbstractContextManager[None]:
        # As in Megatron's attention: tensor-parallel ranks hold different heads and need different
        # masks; under sequence parallelism their default generators differ already.
        if dropout == 0.0 or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gather [s/cp, b, groups, d] to [s, b, groups, d]; the backward is a reduce-scatter."""
        return gather_from_sequence_parallel_region(tensor, group=self.cp_group)


# Setting of the model -> the values that the torch layers support.
_LOCAL_LAYERS: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope", "learned_absolute", "none"),
    "num_moe_experts": (None,),
}


def check_local_layers(settings: Any) -> None:
    """Check that a model can be built without Transformer Engine.

    Args:
        settings: Megatron's arguments or a `TransformerConfig`.

    Raises:
        LETError: names the flag, its value and the supported value.
    """
    for name, possible in _LOCAL_LAYERS.items():
        value = getattr(settings, name, possible[0])
        if value not in possible:
            given = flag(name.replace("_moe", ""))
            remedy = f"give {given} {possible[0]}" if possible[0] else f"drop {given}"
            raise LETError(
                f"{given} {value} needs Transformer Engine, which is not installed; {remedy}, or"
                " install Transformer Engine."
            )

    if dataclasses.is_dataclass(settings):
        _check_fields(settings)


def _check_fields(config: Any) -> None:
    """Check that no field of a `TransformerConfig` that needs Transformer Engine is set."""
    needs_te = read_lists()["transformer_engine"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in needs_te and value and value != field.default:
            raise LETError(
                f"{flag(field.name)} {value} needs Transformer Engine, which is not installed; drop"
                " it or install it."
            )


def local_layer_spec(
    config: GPTModelConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Return a spec for `GPTModelConfig.transformer_layer_spec` (dense Llama-style models).

    Raises:
        LETError: the model needs Transformer Engine.
    """
    transformer = config.transformer
    check_local_layers(transformer)
    layer: ModuleSpec = get_gpt_layer_local_spec(
        qk_layernorm=transformer.qk_layernorm, normalization=transformer.normalization
    )
    submodules = layer.submodules
    submodules.input_layernorm = RMSNorm
    submodules.pre_mlp_layernorm = RMSNorm
    attention = submodules.self_attention.submodules
    attention.core_attention = SDPAttention
    if transformer.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    # A spec of the block, because a layer spec alone keeps the stock final norm.
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(transformer, vp_stage), layer_norm=RMSNorm
    )
