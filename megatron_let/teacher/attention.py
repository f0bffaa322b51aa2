"""Causal attention of the teacher without a mask tensor and without reading from the device.

In every forward pass transformers looks for packed sequences and padding, which waits for the
device; under `torch.compile` it builds a mask instead, and flash attention takes none. The rows of
a teacher are whole: no padding, one sequence each. Both checks are left out here, and a mask is
built only where a layer attends to less than the whole past: sliding windows, and rows of several
documents (`use_document_attention`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
)

# Names of the implementations in transformers' registries.
UNMASKED = "megatron_let_unmasked"
DOCUMENTS = "megatron_let_documents"

# Architectures whose states the tests compare with "sdpa" bitwise. Others are left alone, because
# some of them compare the implementation's name with "sdpa".
ARCHITECTURES = {
    "gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo", "olmo2", "opt", "phi",
    "phi3", "qwen2", "qwen3", "smollm3", "starcoder2",
}  # fmt: skip


def _mask(
    q_length: int,
    kv_length: int,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **rest: Any,
) -> torch.Tensor | None:
    """Return None for a causal mask over all of a row, which SDPA applies itself; else the mask.

    The rule is that of transformers' `sdpa_mask`, without its look at the padding.
    """
    covers_row = local_size is None or kv_length < local_size
    if allow_is_causal_skip and q_length == kv_length and covers_row:
        return None
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **rest | {"attention_mask": None},
    )


def _document_mask(
    attention_mask: torch.Tensor | None = None,
    mask_function: Callable[..., Any] = causal_mask_function,
    **rest: Any,
) -> torch.Tensor | None:
    """Return the layer's mask, without the attention to other documents.

    Args:
        attention_mask: [b, s] bool, true at each token that begins a document.
    """
    if attention_mask is None:
        return _mask(mask_function=mask_function, **rest)
    documents = packed_sequence_mask_function(attention_mask.cumsum(dim=1))
    return sdpa_mask(
        mask_function=and_masks(mask_function, documents), **rest | {"allow_is_causal_skip": False}
    )


# At import, because a model that another rank has set up arrives with the name only.
for _name in (UNMASKED, DOCUMENTS):
    AttentionInterface.register(_name, sdpa_attention_forward)
AttentionMaskInterface.register(UNMASKED, _mask)
AttentionMaskInterface.register(DOCUMENTS, _document_mask)


def use_unmasked_attention(model: PreTrainedModel) -> None:
    """Select this attention for a model with SDPA attention whose architecture is known."""
    config = model.config
    # transformers 4 asks for masks by positions instead of lengths.
    has_lengths = "q_length" in inspect.signature(sdpa_mask).parameters
    is_known = config.model_type in ARCHITECTURES and config._attn_implementation == "sdpa"
    if is_known and has_lengths:
        model.set_attn_implementation(UNMASKED)


def uses_unmasked_attention(model: PreTrainedModel) -> bool:
    """Return whether the model runs without masks, if it is given a padding mask of ones.

    With no padding mask, transformers looks for packed sequences.
    """
    return bool(model.config._attn_implementation == UNMASKED)


def use_document_attention(model: PreTrainedModel) -> None:
    """Select attention within documents, for a model that runs without masks.

    Its `attention_mask` is then that of `Documents.inputs`: in the place of padding, which a row
    does not have, it marks the first token of each document. All other masks of transformers would
    replace those of sliding windows, or be searched for on the device.
    """
    model.set_attn_implementation(DOCUMENTS)
