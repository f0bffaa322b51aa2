"""Logits of a checkpoint from Megatron's GPTModel or from transformers.

Megatron's model runs on the CPU in this process, and reads the checkpoint with Megatron's loader:
a comparison with transformers shares no code with the converter.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_let.checkpoint.architecture import Architecture
from megatron_let.checkpoint.formats import Checkpoint
from megatron_let.checkpoint.torch_dist import TorchDist
from megatron_let.checkpoint.weights import MegatronWeights, Weights
from megatron_let.compat.device import Host, prepare_process
from megatron_let.errors import LETError
from megatron_let.teacher.model import from_pretrained


@torch.no_grad()
def logits(weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """Return the next-token logits of a model, computed in fp32.

    Args:
        tokens: [b, s].

    Returns:
        [b, s, vocab_size], without padded rows.
    """
    if isinstance(weights, MegatronWeights):
        return _megatron_logits(weights, tokens)
    return _hugging_face_logits(weights.folder, tokens)


def _hugging_face_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, _ = from_pretrained(folder, torch.float32, AutoModelForCausalLM)
    rows = [model.eval()(row[None]).logits for row in tokens]
    return torch.cat(rows)


def _megatron_logits(weights: MegatronWeights, tokens: torch.Tensor) -> torch.Tensor:
    with _megatron_on_cpu():
        rows = int(weights.checkpoint.tensors()["embedding.word_embeddings.weight"].shape[0])
        model = _build(weights.architecture, rows, weights.dtype, weights.args)
        _name_norms_as(model, weights.checkpoint.tensors())
        if isinstance(weights.checkpoint, TorchDist):
            _load_torch_dist(model, weights.folder)
        else:
            _load_by_name(model, weights.checkpoint)
        model = model.float().eval()
        positions = torch.arange(tokens.shape[1])[None]
        found = [model(row[None], positions, None) for row in tokens]
    return torch.cat(found)[..., : weights.architecture.vocab_size]


@contextmanager
def _megatron_on_cpu() -> Iterator[None]:
    """Set up one rank and Megatron's random states; the CPU shims stay applied."""
    host = Host(cuda=False, transformer_engine=False, fused_gradients=False)
    prepare_process(host, rank=0)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_let.compat.apply import apply_host_patches

    if not torch.cuda.is_available():
        apply_host_patches(host)
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            parallel_state.initialize_model_parallel()
            model_parallel_cuda_manual_seed(1234)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


# Arguments of a mixture of experts that change what weights compute, and are fields of Megatron's
# config: given to it as they are, so that a misread one is found.
_EXPERT_ARGUMENTS = (
    *("moe_layer_freq", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax"),
    *("moe_router_score_function", "moe_shared_expert_intermediate_size"),
    "moe_shared_expert_gate",
)


def _build(
    architecture: Architecture, rows: int, dtype: torch.dtype, args: Mapping[str, Any]
) -> Any:
    """Build GPTModel from torch's layers.

    Args:
        rows: rows of the embedding, padding included.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_let.compat.local_layers import local_layer_spec

    experts = {name: args[name] for name in _EXPERT_ARGUMENTS if name in args}
    config = TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        num_moe_experts=architecture.num_experts or None,
        **(experts if architecture.num_experts else {}),
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        transformer_impl="local",
    )
    return GPTModel(
        config,
        local_layer_spec(SimpleNamespace(transformer=config)),  # type: ignore[arg-type]
        vocab_size=rows,
        max_sequence_length=architecture.max_positions,
        parallel_output=False,
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope",
        rotary_base=int(architecture.rotary_base),
        rope_scaling=architecture.rope_type == "llama3",
        rope_scaling_factor=architecture.rope_factor,
        seq_len_interpolation_factor=architecture.rope_factor
        if architecture.rope_type == "linear"
        else None,
    )


def _name_norms_as(model: Any, stored: Iterable[str]) -> None:
    """Give the norm before experts the name under which Megatron's local layers store it.

    Ours have the name of Transformer Engine's.
    """
    if not any(name.endswith(".pre_mlp_layernorm.weight") for name in stored):
        for layer in model.decoder.layers:
            names = layer.submodules_config.sharded_state_dict_keys_map
            names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"


def _load_torch_dist(model: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    state = {"model": model.sharded_state_dict()}
    loaded = dist_checkpointing.load(state, str(folder), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    model.load_state_dict(loaded["model"])


def _load_by_name(model: Any, checkpoint: Checkpoint) -> None:
    """Load a checkpoint whose tensors have the names of the module's parameters.

    Raises:
        LETError: it was trained with Transformer Engine's layers, whose norms have other names.
    """
    missing = sorted(dict(model.named_parameters()).keys() - checkpoint.tensors().keys())
    if missing:
        raise LETError(
            f"The checkpoint {checkpoint.folder} has no {missing[0]}, the name in torch's layers;"
            " export it and compare the Hugging Face folder, or give --weights-only."
        )
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors()}
    # Only Transformer Engine's empty entries may be missing.
    model.load_state_dict(tensors, strict=False)
