"""Convert a `.gguf` file to a model folder."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from megatron_let.errors import LETError, first_line
from megatron_let.files.atomic import atomic_file, atomic_folder
from megatron_let.teacher.cache import exclusive_lock, teachers_cache
from megatron_let.teacher.gguf_contents import complete_from_file
from megatron_let.teacher.gguf_tokenizer import set_pre_tokenizer
from megatron_let.teacher.tokenizer import encoder_of, first_different_text, read_tokenizer

# Increased when a conversion's result changes, so that no folder of an older one is used.
_VERSION = 4


def convert_gguf(file: Path) -> Path:
    """Dequantise a `.gguf` file to a bf16 folder in the cache, once per content; return the folder.

    Raises:
        LETError: the file is not a readable GGUF model, or has contents that would be lost.
    """
    if file.suffix != ".gguf":
        raise LETError(
            f"The teacher {file} is a file but not a .gguf file; give a model folder or a .gguf"
            " file."
        )
    digest = _digest(file)
    folder = teachers_cache() / f"{file.stem}-{digest}-{_VERSION}"
    if folder.is_dir():
        return folder
    # All ranks of a node call this; the first one converts.
    with exclusive_lock(folder.with_name(f"{folder.name}.lock"), "MEGATRON_LET_CACHE"):
        if not folder.is_dir():
            _write_folder(file, folder)
    return folder


def _digest(file: Path) -> str:
    """Return a hash of the content, for which one of the ranks that share the cache reads it."""
    found = file.stat()
    state = (file.resolve(), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    key = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    known = teachers_cache() / f"{file.stem}-{key}.digest"
    if known.is_file():
        return known.read_text()
    # Every rank reads the file itself if the cache is read-only.
    with (
        contextlib.suppress(LETError),
        exclusive_lock(known.with_suffix(".lock"), "MEGATRON_LET_CACHE"),
    ):
        if not known.is_file():
            with atomic_file(known) as partial:
                partial.write_text(_hash(file))
        return known.read_text()
    return _hash(file)


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _write_folder(file: Path, folder: Path) -> None:
    names: dict[str, Any] = {
        "gguf_file": file.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    # Recent transformers keep GGUF blocks packed, and a packed model cannot be saved.
    gguf_config = getattr(transformers, "GgufConfig", None)
    dense = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.bfloat16, **dense, **names
            )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **names)
    except Exception as error:  # gguf and transformers raise many types for a damaged file
        raise LETError(
            f"The teacher {file} cannot be read as GGUF ({first_line(error)}); "
            "copy the file again, or install gguf and accelerate."
        ) from error
    complete_from_file(file, model)
    set_pre_tokenizer(file, tokenizer)
    # transformers would try to load the saved folder as a quantised model.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _check_written(file, partial, tokenizer)


def _check_written(file: Path, folder: Path, tokenizer: Any) -> None:
    """Check that the written tokenizer, as it is loaded later, is the file's."""
    text = first_different_text(encoder_of(tokenizer), encoder_of(read_tokenizer(folder)))
    if text is not None:
        raise LETError(
            f"The tokenizer of {file} splits {text!r} differently once it is saved as a folder;"
            " give the model's Hugging Face folder."
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress the progress bar and the report about the unused LM head."""
    level = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
