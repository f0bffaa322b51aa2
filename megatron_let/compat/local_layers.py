"""GPT layer spec of torch modules, for hosts without Transformer Engine.

Megatron's local spec supports neither sequence parallelism in its norm nor context parallelism in
its attention, and materialises [b, heads, s, s] scores. The norm and attention here do not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.training.models import GPTModelConfig

from megatron_let.compat.patch_set import PatchSet
from megatron_let.config.arguments import flag
from megatron_let.config.megatron_arguments import read_lists
from megatron_let.errors import LETError


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm by torch, with sequence parallelism; takes the parameters of Megatron's norms.

    Maps [s, b, h], or [s/tp, b, h] under sequence parallelism, to the same shape.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        # finalize_model_grads sums the gradient of marked parameters over the TP ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


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
        *,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"SDPAttention is causal only, not {attn_mask_type}.")
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout
        self.cp_group = pg_collection.cp

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


class LatentAttention(MLASelfAttention):
    """Megatron's multi-latent attention, with the right gradient under tensor parallelism.

    All heads share one rotary key. Megatron gathers it from its column-parallel projection, and the
    backward of that gather keeps the gradient of this rank's heads only.
    """

    def _qkv_down_projection(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return compressed queries, and keys and values [s/tp, b, kv_lora_rank + rotary width]."""
        queries, combined = super()._qkv_down_projection(hidden_states)
        if self.config.sequence_parallel:
            # Of a shard of the sequence Megatron gathers the rotary key by a function whose
            # backward sums over the ranks.
            combined = gather_from_tensor_model_parallel_region(combined)
            combined = scatter_to_sequence_parallel_region(combined)
        return queries, combined

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Return the projections and norms to build."""
        if self.config.q_lora_rank is not None:
            return super()._resolve_qk_norm_config(submodules)
        # Megatron's resolver requires q_layernorm even without q_lora_rank, then rejects it.
        return {name: getattr(submodules, name) for name in _WITHOUT_QUERY_LATENTS}


_WITHOUT_QUERY_LATENTS = ("linear_q_proj", "linear_kv_up_proj", "kv_layernorm")


class LocalExperts(SequentialMLP):
    """Megatron's experts, with initial weights that do not depend on expert parallelism.

    On the CPU Megatron draws weights from one random sequence that all ranks share, so experts on
    different ranks would be equal. Here each rank draws all experts and keeps its own.
    """

    local_experts: torch.nn.ModuleList

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, *args: Any, **options: Any
    ) -> None:
        drawn = config.num_moe_experts if config.use_cpu_initialization else num_local_experts
        super().__init__(drawn, config, *args, **options)
        first = self.ep_group.rank() * num_local_experts if drawn > num_local_experts else 0
        self.local_experts = self.local_experts[first : first + num_local_experts]
        self.num_local_experts = num_local_experts


# Setting of the model -> the values that the torch layers support.
_LOCAL_LAYERS: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope", "learned_absolute", "none"),
    "moe_token_dispatcher_type": ("allgather", "alltoall"),
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
            given = flag(name)
            raise LETError(
                f"{given} {value} needs Transformer Engine, which is not installed; give {given}"
                f" {possible[0]}, or install Transformer Engine."
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


# Megatron's module -> ours, wherever it is in a spec.
_REPLACED: dict[Any, Any] = {
    WrappedTorchNorm: RMSNorm,
    DotProductAttention: SDPAttention,
    MLASelfAttention: LatentAttention,
    SequentialMLP: LocalExperts,
}


def local_layer_spec(
    config: GPTModelConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Return Megatron's local layers with our modules, for `GPTModelConfig.transformer_layer_spec`.

    Raises:
        LETError: the model needs Transformer Engine.
    """
    transformer = config.transformer
    check_local_layers(transformer)
    block = get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=False,
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
    return with_own_modules(block)


def use_local_layers(model: GPTModelConfig) -> None:
    """Build the layers of `model`, and those of multi-token prediction, of torch modules.

    Raises:
        PatchError: the installed Megatron is not a version that the patch fits.
    """
    model.transformer_layer_spec = local_layer_spec
    if model.transformer.mtp_num_layers is not None:
        PatchSet().apply_all({"megatron.training.models.gpt:mtp_block_spec": _wrap_mtp_spec})


def _wrap_mtp_spec(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def mtp_block_spec(*args: Any, **kwargs: Any) -> Any:
        return with_own_modules(original(*args, **kwargs))

    return mtp_block_spec


def with_own_modules(spec: Any) -> Any:
    """Return a spec with our norm, attention and experts; all but partials change in place."""
    if isinstance(spec, type):
        return _REPLACED.get(spec, spec)
    if isinstance(spec, functools.partial):
        keywords = {name: with_own_modules(value) for name, value in spec.keywords.items()}
        return functools.partial(with_own_modules(spec.func), *spec.args, **keywords)
    if isinstance(spec, list):
        spec[:] = map(with_own_modules, spec)
    elif dataclasses.is_dataclass(spec):
        if isinstance(spec, TransformerLayerSubmodules):
            spec.sharded_state_dict_keys_map = _checkpoint_names(spec)
        for field in dataclasses.fields(spec):
            setattr(spec, field.name, with_own_modules(getattr(spec, field.name)))
    return spec


def _checkpoint_names(layer: TransformerLayerSubmodules) -> dict[str, str]:
    """Return {name of a norm: its name in a checkpoint}, which is that of Transformer Engine.

    It fuses a norm with the linear layer that follows. Experts' norm is not fused, but Megatron's
    local spec names it as if it were; of latent attention it names none.
    """
    names = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if getattr(layer.mlp, "func", None) is MoELayer:
        names = {}
    if not issubclass(layer.self_attention.module, MLASelfAttention):
        return {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", **names}
    of_attention = {"q_layernorm": "linear_q_up_proj", "kv_layernorm": "linear_kv_up_proj"}
    fused = {
        f"self_attention.{norm}.": f"self_attention.{linear}.layer_norm_"
        for norm, linear in of_attention.items()
    }
    return {**fused, **names}
