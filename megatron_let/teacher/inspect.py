"""What a teacher's folder holds, checked without loading a weight."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)

from megatron_let.errors import LETError, first_line
from megatron_let.teacher.quiet import quiet_transformers


@dataclass(frozen=True)
class TeacherFolder:
    """A Hugging Face folder that passed the checks of `inspect_teacher`.

    Attributes:
        path: the folder.
        num_layers, hidden_size, vocab_size: of the model.
        max_positions: longest sequence it was built for; None where the config sets no limit.
    """

    path: Path
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None


def inspect_teacher(teacher: Path, cache: Path | None = None) -> TeacherFolder:
    """Check a teacher's folder or `.gguf` file, converting the latter once into `cache`.

    Reads the config and the headers of the weight files only.

    Raises:
        LETError: missing, not a causal language model, or a weight file that is cut short.
    """
    if not teacher.exists():
        raise LETError(f"The teacher {teacher} does not exist; give --let-teacher a model folder.")
    folder = _convert_gguf(teacher, cache or default_cache()) if teacher.is_file() else teacher
    config = _read_config(folder)
    check_weight_files(folder)
    text_config = config.get_text_config()
    return TeacherFolder(
        path=folder,
        num_layers=text_config.num_hidden_layers,
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size,
        max_positions=getattr(text_config, "max_position_embeddings", None),
    )


def default_cache() -> Path:
    """`$MEGATRON_LET_CACHE`, else `$XDG_CACHE_HOME/megatron_let`, else `~/.cache/megatron_let`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MEGATRON_LET_CACHE") or Path(base) / "megatron_let")


def _read_config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise LETError(
            f"The teacher {folder} has no config.json; give the folder of a Hugging Face model."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises a dozen kinds for a config of no use
        raise LETError(
            f"The teacher {folder} has a config.json that is of no known model "
            f"({first_line(error)})."
        ) from error
    bidirectional = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(
        config, "is_decoder", False
    )
    if (
        type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        or config.is_encoder_decoder
        or bidirectional
    ):
        raise LETError(
            f"The teacher {folder} is a {config.model_type} model, which is no causal language"
            " model; give one such as Llama, GPT-2, OPT or GPT-NeoX."
        )
    return config


def check_weight_files(folder: Path) -> None:
    """Check that every weight file of a folder is there and whole.

    Raises:
        LETError: none is there, one is missing, or one is shorter than its header says.
    """
    files = _weight_files(folder)
    if not files:
        raise LETError(f"The teacher {folder} has no weight file (*.safetensors or *.bin).")
    for file in files:
        if not file.is_file():
            raise LETError(f"The teacher's weight file {file} is missing; copy the folder again.")
        if not (_safetensors_whole(file) if file.suffix == ".safetensors" else _torch_whole(file)):
            raise LETError(
                f"The teacher's weight file {file} is cut short or damaged at "
                f"{file.stat().st_size} bytes; copy it again."
            )


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load, in its order of preference."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return [folder / shard for shard in _shards(index)]
    return sorted(folder.glob("*.safetensors"))


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LETError(
            f"The teacher's weight index {index} is damaged ({first_line(error)}); copy it again."
        ) from error


def _safetensors_whole(file: Path) -> bool:
    """Whether the file is as long as its header says (8-byte length, JSON, data)."""
    try:
        with file.open("rb") as stream:
            (header_length,) = struct.unpack("<Q", stream.read(8))
            if header_length > file.stat().st_size:
                return False
            header = json.loads(stream.read(header_length))
        ends = [t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"]
        return bool(file.stat().st_size == 8 + header_length + max(ends, default=0))
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return False


def _torch_whole(file: Path) -> bool:
    """Whether a pickle by torch opens: a zip has its directory at the end, older ones are read."""
    if zipfile.is_zipfile(file):
        return True
    try:
        torch.load(file, map_location="meta", weights_only=True)
    except Exception:  # a cut pickle raises whatever the byte after the cut means
        return False
    return True


def _convert_gguf(file: Path, cache: Path) -> Path:
    """De-quantise a `.gguf` file to a bf16 folder in `cache`, once per content."""
    if file.suffix != ".gguf":
        raise LETError(f"The teacher {file} is a file but no .gguf; give a folder or a .gguf.")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    folder = cache / "teachers" / f"{file.stem}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        # Every rank of a node comes here; one converts, the others find the folder.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _write_gguf_as_folder(file, folder)
    return folder


def _write_gguf_as_folder(file: Path, folder: Path) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    names: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    # Recent transformers keep GGUF blocks packed, and a packed model cannot be saved.
    gguf_config = getattr(transformers, "GgufConfig", None)
    dense = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.bfloat16, **dense, **names
            )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **names)
    except Exception as error:  # gguf and transformers raise a dozen kinds for a damaged file
        raise LETError(
            f"The teacher {file} cannot be read as GGUF ({first_line(error)}); "
            "copy the file again, or install gguf and accelerate."
        ) from error
    # Else the folder would claim to be quantised, and would not load.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
