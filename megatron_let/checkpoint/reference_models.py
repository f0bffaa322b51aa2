"""A checkpoint's logits by the code that it is meant for: Megatron's GPTModel, or transformers.

Megatron's runs on the CPU in this process, and reads the checkpoint by its own loader, so that a
comparison with transformers shares no code of the converter.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_let.checkpoint.architecture import Llama
from megatron_let.checkpoint.torch_dist import TorchDist
from megatron_let.checkpoint.weights import HuggingFaceWeights, MegatronWeights, Weights
from megatron_let.compat.device import Host, prepare_process
from megatron_let.engines.deepspeed.export import ZeroCheckpoint
from megatron_let.errors import LETError


def logits(weights: Weights, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Next-token logits of a model whose weights are cast to `dtype`.

    Args:
        tokens: [b, s].

    Returns:
        [b, s, vocab_size] in fp32, without padded rows.
    """
    if isinstance(weights, MegatronWeights):
        return megatron_logits(weights, tokens, dtype)
    assert isinstance(weights, HuggingFaceWeights)
    return hugging_face_logits(weights.folder, tokens, dtype)


@torch.no_grad()
def hugging_face_logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits by transformers, with no code of ours.

    Returns:
        [b, s, vocab_size] in fp32.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, attn_implementation="sdpa"
    )
    rows = [model.eval()(row[None]).logits.float() for row in tokens]
    return torch.cat(rows)


@torch.no_grad()
def megatron_logits(
    weights: MegatronWeights, tokens: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Logits by Megatron's GPTModel on this process's CPU.

    Returns:
        [b, s, vocab_size] in fp32.

    Raises:
        LETError: the checkpoint is in the old format.
    """
    if not isinstance(weights.store, TorchDist | ZeroCheckpoint):
        raise LETError(f"The checkpoint {weights.folder} is in the old format; convert it first.")
    with _megatron_on_cpu():
        rows = int(weights.store.tensors()["embedding.word_embeddings.weight"].size[0])
        model = _build(weights.llama, rows, weights.dtype)
        if isinstance(weights.store, ZeroCheckpoint):
            _load_zero(model, weights.store)
        else:
            _load(model, weights.folder)
        model = model.to(dtype).eval()
        positions = torch.arange(tokens.shape[1])[None]
        found = [model(row[None], positions, None).float() for row in tokens]
    return torch.cat(found)[..., : weights.llama.vocab_size]


@contextmanager
def _megatron_on_cpu() -> Iterator[None]:
    """A process group of one, and Megatron's random states; the stand-ins stay for good."""
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


def _build(llama: Llama, rows: int, dtype: torch.dtype) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_let.compat.local_layers import local_layer_spec

    config = TransformerConfig(
        num_layers=llama.num_layers,
        hidden_size=llama.hidden_size,
        ffn_hidden_size=llama.ffn_size,
        num_attention_heads=llama.num_heads,
        num_query_groups=llama.num_query_groups,
        kv_channels=llama.head_size,
        normalization="RMSNorm",
        layernorm_epsilon=llama.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        transformer_impl="local",
    )
    return GPTModel(
        config,
        local_layer_spec(SimpleNamespace(transformer=config)),  # type: ignore[arg-type]
        vocab_size=rows,
        max_sequence_length=llama.max_positions,
        parallel_output=False,
        share_embeddings_and_output_weights=llama.tied,
        position_embedding_type="rope",
        rotary_base=int(llama.rotary_base),
        rope_scaling=llama.rope_type == "llama3",
        rope_scaling_factor=llama.rope_factor,
        seq_len_interpolation_factor=llama.rope_factor if llama.rope_type == "linear" else None,
    )


def _load(model: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    state = {"model": model.sharded_state_dict()}
    loaded = dist_checkpointing.load(state, str(folder), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    model.load_state_dict(loaded["model"])


def _load_zero(model: Any, store: ZeroCheckpoint) -> None:
    """By the module's own names, which DeepSpeed's checkpoints keep.

    Raises:
        LETError: it was trained with Transformer Engine's layers, whose norms have other names.
    """
    missing = sorted(dict(model.named_parameters()).keys() - store.tensors().keys())
    if missing:
        raise LETError(
            f"The checkpoint {store.folder} has no {missing[0]}, by which torch's layers know it;"
            " export it and compare the Hugging Face folder, or give --weights-only."
        )
    tensors = {name: store.read(name) for name in store.tensors()}
    # Only Transformer Engine's empty entries may be missing.
    model.load_state_dict(tensors, strict=False)
