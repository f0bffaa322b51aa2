"""A model's weights under their Hugging Face names, from any checkpoint format."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_let.checkpoint.architecture import from_megatron, ignored_rope_factor
from megatron_let.checkpoint.formats import (
    Checkpoint,
    is_checkpoint,
    iteration_folder,
    open_checkpoint,
)
from megatron_let.checkpoint.model_types import from_hugging_face
from megatron_let.checkpoint.parameter_mapping import (
    ParameterMapping,
    parameter_mappings,
    split,
    unstacked,
)
from megatron_let.checkpoint.safetensors_files import DTYPES, SafetensorsFolder
from megatron_let.config.arguments import padded_vocab_size
from megatron_let.errors import LETError, first_line
from megatron_let.teacher.tokenizer import (
    encoder,
    first_different_text,
    read_sentence_piece,
    read_tokenizer,
)


def open_weights(path: Path, tokenizer: Path | None = None) -> Weights:
    """Open a checkpoint of either engine, a run's folder (its last one) or a Hugging Face folder.

    Reads no weight.

    Args:
        tokenizer: folder or file, instead of the one that the checkpoint names.

    Raises:
        LETError: not a model, not complete, or of another architecture.
    """
    if not path.exists():
        raise LETError(f"The model {path} does not exist.")
    if not path.is_dir():
        raise LETError(f"The model {path} is a file; give the folder that contains it.")
    folder = iteration_folder(path)
    if not is_checkpoint(folder):
        return HuggingFaceWeights(path, tokenizer)
    return MegatronWeights(open_checkpoint(folder), tokenizer)


class MegatronWeights:
    """Weights in a Megatron checkpoint, under their Hugging Face names.

    Attributes:
        dtype: type of the stored weights.
        tokenizer: folder or file of the tokenizer; None if unknown.
        ignored_rope_factor: of `architecture.ignored_rope_factor`.
    """

    def __init__(self, checkpoint: Checkpoint, tokenizer: Path | None) -> None:
        self.checkpoint = checkpoint
        self.folder = checkpoint.folder
        if checkpoint.state.get("args") is None:
            raise LETError(f"The checkpoint {self.folder} has no arguments of its run.")
        self.args: dict[str, Any] = vars(checkpoint.state["args"])
        self.ignored_rope_factor = ignored_rope_factor(self.args)
        own = _tokenizer_of(self.args)
        self.tokenizer = tokenizer or own
        self._stored = dict(checkpoint.tensors())
        embedding = self._stored.get("embedding.word_embeddings.weight")
        if embedding is None:
            raise LETError(
                f"The checkpoint {self.folder} has no word embedding; it is not of a GPT model."
            )
        self.dtype: torch.dtype = embedding.dtype
        rows = int(embedding.shape[0])
        is_own = self.tokenizer is not None and self.tokenizer.resolve() == (own and own.resolve())
        vocab_size = _vocab_size(self.args, self.tokenizer, rows, is_own)
        self.architecture = from_megatron(self.args, vocab_size)
        if tokenizer is not None:
            _check_equal_ids(tokenizer, own, self.folder)
        self._mappings = parameter_mappings(self.architecture)
        self._mapping_of = {name: m for m in self._mappings for name in m.names}
        # The parts of the last tensor that was read and split, which have not been returned yet.
        self._parts: dict[str, torch.Tensor] = {}

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor by its Hugging Face name, or one of `unused` by its own."""
        if name not in self._mapping_of:
            return self.checkpoint.read(name)
        if name not in self._parts:
            # Freed first, so that two of Megatron's tensors are never held at once.
            self._parts = {}
            mapping = self._mapping_of[name]
            parts = split(mapping, self._read_merged(mapping), self.architecture)
            self._parts = dict(zip(mapping.names, parts, strict=True))
        return self._parts.pop(name)

    def unused(self) -> list[str]:
        """Return the names of stored tensors that are not part of the model."""
        names = {n for m in self._mappings for n in self._stored_names(m)[0]}
        return sorted(self._stored.keys() - names)

    def _stored_names(self, mapping: ParameterMapping) -> tuple[list[str], tuple[int, ...]]:
        """Return the stored names and the index: stacked layers, or separate names per layer."""
        for names, index in (
            (mapping.megatron, mapping.index),
            (unstacked(mapping), mapping.index[1:]),
        ):
            stored = [name for name in names if name in self._stored]
            if stored:
                return stored, index
        raise LETError(f"The checkpoint {self.folder} has no tensor {mapping.megatron[0]}.")

    def _read_merged(self, mapping: ParameterMapping) -> torch.Tensor:
        (name, *_), index = self._stored_names(mapping)
        size = tuple(self._stored[name].shape)
        axes, shape = size[: len(index)], size[len(index) :]
        architecture = self.architecture
        expected = (architecture.num_layers, architecture.num_experts)[: len(mapping.index)]
        padded = mapping.kind == "vocabulary" and shape[0] >= mapping.shape[0]
        fits = shape == mapping.shape or (padded and shape[1:] == mapping.shape[1:])
        if not fits or axes != expected[len(expected) - len(index) :]:
            raise LETError(
                f"The checkpoint's tensor {name} is {size}, and its arguments ask for"
                f" {mapping.shape}; checkpoint and arguments do not belong together."
            )
        return self.checkpoint.read(name, index)


def _tokenizer_of(args: Mapping[str, Any]) -> Path | None:
    model = args.get("tokenizer_model")
    return Path(model) if model and Path(model).exists() else None


def _check_equal_ids(given: Path, own: Path | None, folder: Path) -> None:
    """Check that `--tokenizer` gives the ids of the run's tokenizer, where that is still there.

    Raises:
        LETError: names a text whose ids differ.
    """
    if own is None or own.resolve() == given.resolve():
        return
    try:
        trained_with = encoder(own)
    except LETError:
        return
    text = first_different_text(trained_with, encoder(given))
    if text is not None:
        raise LETError(
            f"The tokenizer {given} splits {text!r} differently from {own}, the tokenizer of"
            f" {folder}; leave out --tokenizer, or give an equal one."
        )


def _vocab_size(args: Mapping[str, Any], tokenizer: Path | None, rows: int, is_own: bool) -> int:
    """Return the number of the embedding's rows that are tokens.

    Args:
        is_own: whether the tokenizer is the run's, whose embedding may have been given more rows.

    Raises:
        LETError: the tokenizer is not the run's.
    """
    known = args.get("vocab_size")
    if tokenizer is None:
        # Without a tokenizer the padding is known only if the run was given a size.
        return min(int(known), rows) if known else rows
    size = len(load_tokenizer(tokenizer))
    expected = padded_vocab_size(
        size,
        int(args.get("make_vocab_size_divisible_by") or 128),
        int(args.get("tensor_model_parallel_size") or 1),
    )
    if size > rows or (known is None and expected != rows and not is_own):
        raise LETError(
            f"The tokenizer {tokenizer} has {size} tokens, padded {expected}, and the checkpoint's"
            f" embedding has {rows} rows; give the run's --tokenizer."
        )
    return max(size, min(int(known), rows)) if known else size


def load_tokenizer(path: Path) -> Any:
    """Load a tokenizer's folder or SentencePiece file; `len` is its number of ids.

    Raises:
        LETError: the tokenizer cannot be read.
    """
    return read_sentence_piece(path) if path.is_file() else read_tokenizer(path)


class HuggingFaceWeights:
    """Weights in a Hugging Face folder; attributes as of `MegatronWeights`."""

    def __init__(self, folder: Path, tokenizer: Path | None = None) -> None:
        self.folder = folder
        config = _read_config(folder)
        self.architecture = from_hugging_face(config)
        self._files = SafetensorsFolder(folder)
        if self.architecture.tied and not self._is_tied():
            self.architecture = replace(self.architecture, tied=False)
        self._shapes = dict(t for m in parameter_mappings(self.architecture) for t in m.tensors)
        self.tokenizer = tokenizer or tokenizer_in(folder)
        self._check_shapes()
        # The widest of a folder that mixes types, so that no weight is rounded.
        types = (DTYPES[self._files.shape_and_dtype(name)[1]] for name in self._shapes)
        self.dtype = functools.reduce(torch.promote_types, types)
        if self.tokenizer is not None:
            check_tokenizer_size(self.tokenizer, self.architecture.vocab_size)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor by its name."""
        return self._files.read(name)

    def _is_tied(self) -> bool:
        """Return whether the files have no output layer of their own.

        transformers 5 also believes the files instead of `tie_word_embeddings`.
        """
        head = "lm_head.weight"
        if head not in self._files.names():
            return True
        return torch.equal(self.read(head), self.read("model.embed_tokens.weight"))

    def unused(self) -> list[str]:
        """Return the names of stored tensors that are not part of the model."""
        # Ignore buffers of old versions and tied copies.
        known = {n for n in self._files.names() if n.endswith("rotary_emb.inv_freq")}
        tied = {"lm_head.weight"} if self.architecture.tied else set()
        return sorted(self._files.names() - self._shapes.keys() - known - tied)

    def _check_shapes(self) -> None:
        for name, wanted in self._shapes.items():
            if name not in self._files.names():
                self._refuse_stacked_experts()
                raise LETError(f"The folder {self.folder} has no tensor {name}; copy it again.")
            shape, dtype = self._files.shape_and_dtype(name)
            if shape != wanted or dtype not in DTYPES:
                raise LETError(
                    f"The tensor {name} in {self.folder} is {shape} of {dtype}, and config.json"
                    f" asks for {wanted} of {', '.join(DTYPES)}."
                )

    def _refuse_stacked_experts(self) -> None:
        stacked = [n for n in self._files.names() if n.endswith("experts.gate_up_proj")]
        if stacked:
            raise LETError(
                f"The folder {self.folder} has the experts of a layer in one tensor ({stacked[0]},"
                " transformers' save_original_format=False); load it with transformers, and write"
                " it with save_pretrained()."
            )


Weights = MegatronWeights | HuggingFaceWeights


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise LETError(
            f"The folder {folder} is neither a Megatron checkpoint nor a Hugging Face model (no"
            " config.json)."
        )
    try:
        config: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise LETError(f"{file} is not valid JSON ({first_line(error)}).") from error
    return config


def tokenizer_in(folder: Path) -> Path | None:
    """Return the folder itself if it has a tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    return folder if any((folder / name).is_file() for name in names) else None


def check_tokenizer_size(tokenizer: Path, vocab_size: int) -> None:
    """Check that a model's embedding has a row for each token.

    Raises:
        LETError: names both sizes.
    """
    size = len(load_tokenizer(tokenizer))
    if size > vocab_size:
        raise LETError(
            f"The tokenizer {tokenizer} has {size} tokens and the model's embedding {vocab_size}"
            " rows; give the model's --tokenizer."
        )
