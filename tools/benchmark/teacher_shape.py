"""Teachers of given sizes, for measurements in which the weights do not matter."""

from __future__ import annotations

from typing import Any

from megatron_let.planner.sizes import TransformerSize


def llama_config(size: TransformerSize, **others: Any) -> Any:
    """Return transformers' `LlamaConfig` of these sizes."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.ffn_hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        tie_word_embeddings=size.tied,
        **others,
    )
