"""Locate a teacher and check what its folder holds, without loading a weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)

from megatron_let.errors import LETError, first_line
from megatron_let.teacher.gguf import convert_gguf
from megatron_let.teacher.hub import download_model, parse_hub_id
from megatron_let.teacher.weight_files import check_weight_files


@dataclass(frozen=True)
class TeacherFolder:
    """A model folder that passed the checks of `inspect_teacher`.

    Attributes:
        path: the folder.
        num_layers, hidden_size, vocab_size: sizes of the model.
        max_positions: longest sequence the model supports; None if the config sets no limit.
        dtype: type of the weights in the config; None if it states none.
    """

    path: Path
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    dtype: torch.dtype | None = field(default=None, compare=False)


def resolve_teacher(teacher: str | Path) -> Path:
    """Return the model folder of a teacher.

    Args:
        teacher: a folder, a `.gguf` file (converted once into the cache), or an id on the Hugging
            Face Hub, `owner/name` or `owner/name@revision`. An existing path wins over an id.

    Raises:
        LETError: there is no such teacher, or it cannot be converted or downloaded.
    """
    path = Path(teacher)
    if path.is_file():
        return convert_gguf(path)
    if path.exists():
        return path
    hub_id = parse_hub_id(str(teacher))
    if hub_id is None:
        raise LETError(
            f"The teacher {teacher} does not exist; give --let-teacher a model folder, a .gguf file"
            " or an id on the Hugging Face Hub (owner/name)."
        )
    return download_model(*hub_id)


def inspect_teacher(teacher: str | Path) -> TeacherFolder:
    """Locate a teacher and read its sizes; see `resolve_teacher` for its forms.

    Reads the config and the headers of the weight files only.

    Raises:
        LETError: the teacher is missing, is not a causal language model, or has a damaged weight
            file.
    """
    folder = resolve_teacher(teacher)
    config = _read_config(folder)
    text_config = config.get_text_config(decoder=True)
    check_weight_files(folder)
    return TeacherFolder(
        path=folder,
        num_layers=text_config.num_hidden_layers,
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size,
        max_positions=max_positions(text_config),
        dtype=config.dtype if isinstance(config.dtype, torch.dtype) else None,
    )


# What architectures call their longest sequence; most have `max_position_embeddings`.
_POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the longest sequence of a model; None if its config sets no limit."""
    found = (getattr(config, name, None) for name in _POSITION_LIMITS)
    return next((limit for limit in found if isinstance(limit, int)), None)


# transformers has causal classes for them, but XLNet permutes the order and needs its target's
# position, and ProphetNet predicts several tokens at once.
_OTHER_ORDERS = ("xlnet", "prophetnet")


def _read_config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise LETError(
            f"The model {folder} has no config.json; give the folder of a Hugging Face model."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for an unusable config
        if "trust_remote_code" in str(error):
            raise LETError(
                f"The model {folder} is Python code (auto_map in config.json), which is never run;"
                " give a model that transformers supports."
            ) from error
        raise LETError(
            f"The model {folder} has a config.json of an unknown model ({first_line(error)});"
            " give a model that transformers supports."
        ) from error
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise LETError(
            f"The model {folder} is quantised (quantization_config of {method} in config.json);"
            " give the full-precision model, or load it where its package is installed, call"
            " dequantize() and save_pretrained()."
        )
    if config.model_type in _OTHER_ORDERS:
        raise LETError(
            f"The model {folder} is a {config.model_type} model, which does not predict one token"
            " after the other from left to right; give a causal decoder such as Llama or GPT-2."
        )
    is_decoder = getattr(config, "is_decoder", False)
    bidirectional = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not is_decoder
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not bidirectional
    if not is_causal or config.is_encoder_decoder:
        raise LETError(
            f"The model {folder} is a {config.model_type} model, not a causal language model;"
            " give one such as Llama, GPT-2, OPT or GPT-NeoX."
        )
    return config
