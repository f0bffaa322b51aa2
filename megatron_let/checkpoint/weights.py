"""A Llama's weights under their Hugging Face names, wherever they lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_let.checkpoint.architecture import (
    Llama,
    from_hugging_face,
    from_megatron,
    padded_vocab_size,
)
from megatron_let.checkpoint.legacy import read_legacy
from megatron_let.checkpoint.parameter_mapping import Block, blocks, split
from megatron_let.checkpoint.safetensors_files import SafetensorsFolder
from megatron_let.checkpoint.torch_dist import (
    TorchDist,
    is_checkpoint,
    iteration_folder,
    legacy_files,
)
from megatron_let.engines.deepspeed.export import ZeroCheckpoint, is_zero_checkpoint
from megatron_let.errors import LETError, first_line

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Weights(Protocol):
    """The weights of one model.

    Attributes:
        folder: where they lie.
        llama: their architecture.
        dtype: as they are stored.
        tokenizer: folder or file of the tokenizer, where one is known.
    """

    folder: Path
    llama: Llama
    dtype: torch.dtype
    tokenizer: Path | None

    def read(self, name: str) -> torch.Tensor:
        """One tensor by its Hugging Face name."""
        ...

    def unused(self) -> list[str]:
        """Tensors that are stored and have no place in the model."""
        ...


def open_weights(path: Path, tokenizer: Path | None = None, trust: bool = False) -> Weights:
    """Open a checkpoint of either engine, a run's folder (its last one) or a Hugging Face folder.

    Reads no weight.

    Args:
        tokenizer: folder or file, instead of the one that the checkpoint names.
        trust: read Megatron's old format too, whose pickles can run code.

    Raises:
        LETError: neither, not whole, or no Llama.
    """
    if not path.exists():
        raise LETError(f"The model {path} does not exist.")
    if not path.is_dir():
        raise LETError(f"The model {path} is a file; give the folder that it lies in.")
    folder = iteration_folder(path)
    if is_zero_checkpoint(folder):
        zero = ZeroCheckpoint(folder)
        return MegatronWeights(folder, zero, zero.state, tokenizer)
    if legacy_files(folder) and trust:
        return MegatronWeights(folder, *read_legacy(folder), tokenizer)
    if is_checkpoint(folder) or legacy_files(folder):
        checkpoint = TorchDist(folder)
        return MegatronWeights(folder, checkpoint, checkpoint.common_state(), tokenizer)
    return HuggingFaceWeights(path, tokenizer)


class TensorStore(Protocol):
    """Tensors under Megatron's names, layers of one name stacked or not."""

    def tensors(self) -> Mapping[str, Any]:
        """Name -> something with the tensor's `size` and `properties.dtype`."""
        ...

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        """One tensor, or one layer of it."""
        ...


class MegatronWeights:
    """Weights in a Megatron checkpoint; see `Weights`.

    Attributes:
        args: the run's arguments.
        state: all that the checkpoint holds beside tensors.
    """

    def __init__(
        self, folder: Path, store: TensorStore, state: Mapping[str, Any], tokenizer: Path | None
    ) -> None:
        self.folder = folder
        self.state = state
        self.store = store
        if state.get("args") is None:
            raise LETError(f"The checkpoint {folder} holds no arguments of its run.")
        self.args: dict[str, Any] = vars(state["args"])
        self.tokenizer = tokenizer or _tokenizer_of(self.args)
        self._stored = dict(store.tensors())
        embedding = self._stored.get("embedding.word_embeddings.weight")
        if embedding is None:
            raise LETError(f"The checkpoint {folder} has no word embedding; it is of no GPT model.")
        self.dtype: torch.dtype = embedding.properties.dtype
        rows = int(embedding.size[0])
        self.llama = from_megatron(self.args, _vocab_size(self.args, self.tokenizer, rows))
        self._blocks = {name: block for block in blocks(self.llama) for name in block.names}
        self._last: tuple[Block, dict[str, torch.Tensor]] | None = None

    def read(self, name: str) -> torch.Tensor:
        """One tensor by its Hugging Face name."""
        block = self._blocks[name]
        if self._last is None or self._last[0] is not block:
            self._last = None
            parts = split(block, self._read_block(block), self.llama)
            self._last = (block, dict(zip(block.names, parts, strict=True)))
        tensors = self._last[1]
        # The last of a block is let go, so that no two blocks are held at once.
        return tensors[name] if name != block.names[-1] else self._release()[name]

    def _release(self) -> dict[str, torch.Tensor]:
        assert self._last is not None
        tensors = self._last[1]
        self._last = None
        return tensors

    def unused(self) -> list[str]:
        """Tensors that are stored and have no place in the model."""
        used = {self._stored_name(block)[0] for block in self._blocks.values()}
        return sorted(set(self._stored) - used - self._per_layer_names())

    def _per_layer_names(self) -> set[str]:
        return {
            name
            for block in self._blocks.values()
            for name in _unstacked(block)
            if name in self._stored
        }

    def _stored_name(self, block: Block) -> tuple[str, int | None]:
        """Name and layer under which a block is stored: stacked, or one name a layer."""
        for name in block.megatron:
            if name in self._stored:
                return name, block.layer
        for name in _unstacked(block):
            if name in self._stored:
                return name, None
        raise LETError(f"The checkpoint {self.folder} has no tensor {block.megatron[0]}.")

    def _read_block(self, block: Block) -> torch.Tensor:
        name, layer = self._stored_name(block)
        size = tuple(self._stored[name].size)
        count, shape = (1, size) if layer is None else (size[0], size[1:])
        padded = block.kind == "vocabulary" and shape[0] >= block.shape[0]
        fits = shape == block.shape or (padded and shape[1:] == block.shape[1:])
        if not fits or (layer is not None and count != self.llama.num_layers):
            raise LETError(
                f"The checkpoint's tensor {name} is {size}, and its arguments ask for"
                f" {block.shape}; checkpoint and arguments do not belong together."
            )
        return self.store.read(name, layer)


def _unstacked(block: Block) -> list[str]:
    if block.layer is None:
        return []
    prefix, place = "decoder.layers.", f"decoder.layers.{block.layer}."
    return [name.replace(prefix, place, 1) for name in block.megatron]


def _tokenizer_of(args: Mapping[str, Any]) -> Path | None:
    model = args.get("tokenizer_model")
    return Path(model) if model and Path(model).exists() else None


def _vocab_size(args: Mapping[str, Any], tokenizer: Path | None, rows: int) -> int:
    """Rows of the embedding that are tokens.

    Raises:
        LETError: the tokenizer is not the one of the run.
    """
    known = args.get("vocab_size")
    if tokenizer is None:
        # Without a tokenizer the padding can be told only where the run was given a size.
        return min(int(known), rows) if known else rows
    size = tokenizer_size(tokenizer)
    expected = padded_vocab_size(
        size,
        int(args.get("make_vocab_size_divisible_by") or 128),
        int(args.get("tensor_model_parallel_size") or 1),
    )
    if size > rows or (known is None and expected != rows):
        raise LETError(
            f"The tokenizer {tokenizer} has {size} tokens, padded {expected}, and the checkpoint's"
            f" embedding has {rows} rows; give the run's own --tokenizer."
        )
    return max(size, min(int(known), rows)) if known else size


def tokenizer_size(path: Path) -> int:
    """Number of ids of a tokenizer's folder or SentencePiece file.

    Raises:
        LETError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        if path.is_file():
            import sentencepiece

            return int(sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size())
        return len(AutoTokenizer.from_pretrained(path, local_files_only=True))
    except Exception as error:  # a dozen kinds for a damaged tokenizer
        raise LETError(f"The tokenizer {path} cannot be read ({first_line(error)}).") from error


class HuggingFaceWeights:
    """Weights in a Hugging Face folder; see `Weights`."""

    def __init__(self, folder: Path, tokenizer: Path | None = None) -> None:
        self.folder = folder
        config = _read_config(folder)
        self.llama = from_hugging_face(config)
        self._files = SafetensorsFolder(folder)
        self._shapes = dict(t for block in blocks(self.llama) for t in block.tensors)
        first = "model.embed_tokens.weight"
        self.tokenizer = tokenizer or _own_tokenizer(folder)
        self._check_shapes()
        self.dtype = _DTYPES[self._files.shape_and_dtype(first)[1]]
        if self.tokenizer is not None:
            _check_tokenizer(self.tokenizer, self.llama.vocab_size)

    def read(self, name: str) -> torch.Tensor:
        """One tensor by its Hugging Face name."""
        return self._files.read(name)

    def unused(self) -> list[str]:
        """Tensors that are stored and have no place in the model."""
        # Buffers of old versions, and the copy of a tied embedding, hold nothing of their own.
        known = {n for n in self._files.names() if n.endswith("rotary_emb.inv_freq")}
        tied = {"lm_head.weight"} if self.llama.tied else set()
        return sorted(self._files.names() - self._shapes.keys() - known - tied)

    def _check_shapes(self) -> None:
        for name, wanted in self._shapes.items():
            if name not in self._files.names():
                raise LETError(f"The folder {self.folder} has no tensor {name}; copy it again.")
            shape, dtype = self._files.shape_and_dtype(name)
            if shape != wanted or dtype not in _DTYPES:
                raise LETError(
                    f"The tensor {name} in {self.folder} is {shape} of {dtype}, and config.json"
                    f" asks for {wanted} of {', '.join(_DTYPES)}."
                )


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
        raise LETError(f"{file} is no JSON ({first_line(error)}).") from error
    return config


def _own_tokenizer(folder: Path) -> Path | None:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    return folder if any((folder / name).is_file() for name in names) else None


def _check_tokenizer(tokenizer: Path, vocab_size: int) -> None:
    size = tokenizer_size(tokenizer)
    if size > vocab_size:
        raise LETError(
            f"The tokenizer {tokenizer} has {size} tokens and the model's embedding {vocab_size}"
            " rows; give the model's own --tokenizer."
        )
