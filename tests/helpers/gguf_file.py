"""Small GGUF files, written with the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import PreTrainedModel, PreTrainedTokenizerFast

_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
_OTHER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def save_gguf(
    path: Path,
    model: PreTrainedModel,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    without: str = "",
    pre: str | None = "gpt-2",
    tokenizer: PreTrainedTokenizerFast | None = None,
    sentence_piece: SentencePieceProcessor | None = None,
    space_prefix: bool | None = None,
) -> Path:
    """Write a Llama in fp32, with more metadata under `llama.`, and more tensors or one less.

    Args:
        pre: name of the pre-tokenizer; None for a file of the time before it was stored.
        tokenizer: byte-level BPE with an id for each row of the embedding; None for one of
            arbitrary characters.
        sentence_piece: takes the place of the byte-level BPE.
        space_prefix: `tokenizer.ggml.add_space_prefix`; None leaves it out.
    """
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if sentence_piece is None:
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        tokens, merges = _tokens_and_merges(config.vocab_size, tokenizer)
        writer.add_token_list(tokens)
        writer.add_token_types([3] + [1] * (config.vocab_size - 1))
        writer.add_token_merges(merges)
        writer.add_eos_token_id(0)
    else:
        _add_sentence_piece(writer, sentence_piece)
    if space_prefix is not None:
        writer.add_add_space_prefix(space_prefix)
    for name, value in (metadata or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"llama.{name}", value)
    for name, tensor in model.state_dict().items():
        is_copy = name == "lm_head.weight" and config.tie_word_embeddings
        if not is_copy and name != without:
            writer.add_tensor(_gguf_name(name), _permuted(name, tensor, config).float().numpy())
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sentence_piece(writer: gguf.GGUFWriter, processor: SentencePieceProcessor) -> None:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(processor.serialized_model_proto())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.piece.encode() for piece in proto.pieces])
    writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_token_types([int(piece.type) for piece in proto.pieces])
    writer.add_unk_token_id(processor.unk_id())
    writer.add_eos_token_id(processor.eos_id())


def _tokens_and_merges(
    vocab_size: int, tokenizer: PreTrainedTokenizerFast | None
) -> tuple[list[str], list[str]]:
    if tokenizer is None:
        # transformers reads the tokens of a byte-level BPE and needs a merge.
        tokens = [chr(0x100 + index) for index in range(vocab_size - 2)]
        return ["<end>", *tokens, "".join(tokens[:2])], [" ".join(tokens[:2])]
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return sorted(state["vocab"], key=state["vocab"].get), [" ".join(m) for m in state["merges"]]


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _OTHER:
        return f"{_OTHER[stem]}.weight"
    _, _, index, rest = stem.split(".", 3)
    return f"blk.{index}.{_LAYER[rest]}.weight"


def _permuted(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """Return queries and keys in llama.cpp's order of RoPE's pairs."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    kind = name.split(".")[-2]
    if kind not in heads:
        return tensor
    pairs = tensor.view(heads[kind], 2, -1, tensor.shape[1])
    return pairs.transpose(1, 2).reshape(tensor.shape)
