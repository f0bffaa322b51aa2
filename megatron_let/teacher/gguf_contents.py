"""Check that the model that transformers built from a GGUF file has all that the file states.

transformers skips the tensors and metadata of a GGUF file that it has no place for.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_let.errors import LETError

# llama.cpp's factors of RoPE's wavelengths, in place of a scaling's parameters.
_ROPE_FACTORS = "rope_freqs.weight"
# Constants of every Llama 3 with a scaling; only its factor differs.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Metadata that the loader does not read -> the setting of transformers that it has to equal.
_SETTINGS = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
    "use_parallel_residual": "use_parallel_residual",
}
# Metadata that the loader does not read -> the value without an effect; None for any.
_WITHOUT_EFFECT = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scale_linear": 1.0,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.finetuned": None,
    "rope.scaling.original_context_length": None,
    "tensor_data_layout": None,
}


def complete_from_file(file: Path, model: Any) -> None:
    """Set the RoPE scaling that the file states, and check that the rest of it was read.

    Args:
        model: causal model that transformers loaded from it.

    Raises:
        LETError: names a tensor or metadata that the model does not have.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = tensors.pop(_ROPE_FACTORS, None)
    if factors is not None:
        _set_rope_scaling(file, model.config, np.array(factors.data, dtype=np.float64))
    _check_tensors(file, tensors, model)
    _check_metadata(file, reader, model.config)


def _set_rope_scaling(file: Path, config: Any, factors: np.ndarray) -> None:
    """Find the Llama 3 scaling whose wavelengths are the file's."""
    plain = dict(config.rope_parameters)
    scaled = _LLAMA3 | {"rope_theta": plain["rope_theta"], "factor": float(factors.max())}
    config.rope_parameters = scaled
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = np.arange(0, 2 * len(factors), 2) / (2 * len(factors))
    expected = plain["rope_theta"] ** -exponents / factors
    if len(found) != len(factors) or not np.allclose(found.numpy(), expected, rtol=1e-3, atol=0):
        raise LETError(
            f"The teacher {file} scales RoPE by its tensor {_ROPE_FACTORS} in another way than"
            " Llama 3; give the model's Hugging Face folder."
        )


def _check_tensors(file: Path, tensors: dict[str, Any], model: Any) -> None:
    """Compare numbers of elements, which every renaming, merge and permutation keeps."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    count = sum(int(tensor.n_elements) for tensor in tensors.values())
    expected = sum(parameter.numel() for parameter in model.parameters())
    if count == expected:
        return
    if count < expected:
        raise LETError(
            f"The teacher {file} has {count:,} of its model's {expected:,} weights; merge the parts"
            " of a split file (llama-gguf-split --merge), or give the model's Hugging Face folder."
        )
    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    names: set[str] = set()
    if model.config.model_type in kinds:
        layers = model.config.get_text_config().num_hidden_layers
        known = get_tensor_name_map(kinds[model.config.model_type], layers)
        names = {str(known.get_name(n.rpartition(".")[0])) for n, _ in model.named_parameters()}
    unknown = [name for name in tensors if name.rpartition(".")[0] not in names]
    raise LETError(
        f"The teacher {file} has {count:,} weights and transformers' model of it {expected:,}:"
        f" {', '.join(unknown[:3]) or 'some'} would be lost; give the model's Hugging Face folder."
    )


def _check_metadata(file: Path, reader: Any, config: Any) -> None:
    architecture = reader.fields["general.architecture"].contents()
    mappings: dict[str, Any] = dict(GGUF_CONFIG_MAPPING)
    mapping = mappings.get(architecture) or mappings.get(config.model_type)
    for key, entry in reader.fields.items():
        name = key.removeprefix(f"{architecture}.")
        # Without a mapping transformers reads the architecture by a function of its own.
        if name == key or mapping is None or mapping.get(name) is not None:
            continue
        value = entry.contents()
        if not _has_no_effect(name, value, config):
            raise LETError(
                f"The teacher {file} has {key} = {value}, which transformers does not read; give"
                " the model's Hugging Face folder."
            )


def _has_no_effect(name: str, value: Any, config: Any) -> bool:
    if name in _SETTINGS:
        ours = getattr(config, _SETTINGS[name], None)
        if ours is None and _SETTINGS[name] == "head_dim":
            ours = config.hidden_size // config.num_attention_heads
        return _same(value, ours) or (ours is None and not value)
    if name not in _WITHOUT_EFFECT:
        return False
    return _WITHOUT_EFFECT[name] is None or _same(value, _WITHOUT_EFFECT[name])


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, int | float):
        return math.isclose(first, second, rel_tol=1e-5)
    return bool(first == second)
