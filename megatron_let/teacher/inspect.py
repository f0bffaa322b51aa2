"""Locate a teacher and check what its folder holds, without loading a weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
    """

    path: Path
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None


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
    text_config = _read_config(folder).get_text_config()
    check_weight_files(folder)
    return TeacherFolder(
        path=folder,
        num_layers=text_config.num_hidden_layers,
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size,
        max_positions=getattr(text_config, "max_position_embeddings", None),
    )


def _read_config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise LETError(
            f"The teacher {folder} has no config.json; give the folder of a Hugging Face model."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many types for an unusable config
        raise LETError(
            f"The teacher {folder} has a config.json of an unknown model ({first_line(error)});"
            " give a model that transformers supports."
        ) from error
    is_decoder = getattr(config, "is_decoder", False)
    bidirectional = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not is_decoder
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not bidirectional
    if not is_causal or config.is_encoder_decoder:
        raise LETError(
            f"The teacher {folder} is a {config.model_type} model, not a causal language model;"
            " give one such as Llama, GPT-2, OPT or GPT-NeoX."
        )
    return config
