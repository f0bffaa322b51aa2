"""HybridStack spec of torch modules, for hosts without Transformer Engine.

Megatron's hybrid specs and the stack's final norm are Transformer Engine's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer

from megatron_let.compat.local_layers import (
    RMSNorm,
    SDPAttention,
    check_local_layers,
    with_own_modules,
)


class LocalHybridStack(HybridStack):
    """Megatron's stack with a final norm by torch."""

    def __init__(
        self, config: TransformerConfig, submodules: HybridStackSubmodules, **options: Any
    ) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **options)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)


def local_hybrid_spec(transformer: TransformerConfig) -> ModuleSpec:
    """Return a spec for `HybridModelConfig.hybrid_stack_spec`: attention, MLP, MoE, Mamba.

    Attention and MLP are the halves of the layers that GPTModel has without Transformer Engine.
    The mixer of Mamba entries runs kernels of the package mamba-ssm.

    Raises:
        LETError: the model needs Transformer Engine.
    """
    check_local_layers(transformer)
    layer = get_gpt_layer_local_submodules(normalization=transformer.normalization)
    layer.self_attention.submodules.core_attention = SDPAttention
    attention = replace(
        layer,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=IdentityOp,
        mlp=IdentityOp,
        mlp_bda=IdentityFuncOp,
    )
    mlp = replace(
        layer,
        input_layernorm=IdentityOp,
        self_attention=IdentityOp,
        self_attn_bda=IdentityFuncOp,
        pre_mlp_layernorm=RMSNorm,
    )
    experts = replace(
        mlp,
        # Any number: the layer takes it from the config.
        mlp=with_own_modules(get_moe_module_spec(use_te=False, num_experts=1)),
        # Transformer Engine fuses no norm with experts.
        sharded_state_dict_keys_map={},
    )
    mamba = MambaLayerSubmodules(
        norm=RMSNorm,
        mixer=ModuleSpec(
            module=MambaMixer,
            submodules=MambaMixerSubmodules(
                in_proj=ColumnParallelLinear, out_proj=RowParallelLinear
            ),
        ),
        mamba_bda=get_bias_dropout_add,
        # As in the attention and MLP layers: the name in Transformer Engine's checkpoints.
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )
    entries = HybridStackSubmodules(
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=experts),
    )
    return ModuleSpec(module=LocalHybridStack, submodules=entries)
