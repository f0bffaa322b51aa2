"""Conversion between Megatron checkpoints and Hugging Face folders, one tensor at a time."""

from __future__ import annotations

import argparse
import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_let.checkpoint.architecture import (
    Llama,
    check_layout,
    padded_vocab_size,
    to_hugging_face,
    to_megatron,
)
from megatron_let.checkpoint.parameter_mapping import (
    EXTRA_STATES,
    EXTRA_STATES_ONCE,
    Block,
    blocks,
    merge,
)
from megatron_let.checkpoint.safetensors_files import TensorPlan, write_safetensors
from megatron_let.checkpoint.torch_dist import COMMON_STATE
from megatron_let.checkpoint.torch_dist_writer import Shard, write_torch_dist
from megatron_let.checkpoint.weights import Weights
from megatron_let.errors import LETError, first_line
from megatron_let.files.atomic import atomic_folder
from megatron_let.files.names import TRACKER

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json",
                    "added_tokens.json", "chat_template*")  # fmt: skip


def to_hugging_face_folder(
    weights: Weights,
    output: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    force: bool = False,
) -> None:
    """Write a Hugging Face Llama folder: config, generation config, safetensors, tokenizer.

    Args:
        dtype: of the weights; None keeps the checkpoint's.

    Raises:
        LETError: a tensor without a place, or `output` exists; nothing is left behind.
    """
    refuse_unused(weights)
    dtype = dtype or weights.dtype
    plan = [
        TensorPlan(name, shape, dtype)
        for block in blocks(weights.llama)
        for name, shape in block.tensors
    ]
    with atomic_folder(output, force) as folder:
        special = _copy_tokenizer(weights.tokenizer, folder)
        config = to_hugging_face(weights.llama, str(dtype).removeprefix("torch.")) | special
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", special)
        write_safetensors(folder, plan, weights.read, max_shard_size)


def refuse_unused(weights: Weights) -> None:
    """Refuse weights that a conversion would drop in silence.

    Raises:
        LETError: names one of them.
    """
    unused = weights.unused()
    if unused:
        raise LETError(
            f"{weights.folder} has {len(unused)} tensors that are no part of a Llama, such as"
            f" {unused[0]}; it is another architecture."
        )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _copy_tokenizer(tokenizer: Path | None, folder: Path) -> dict[str, Any]:
    """Put the tokenizer beside the model; return the ids of its special tokens."""
    if tokenizer is None:
        return {}
    if tokenizer.is_file():
        shutil.copy(tokenizer, folder / "tokenizer.model")
        tokenizer = folder
    else:
        for pattern in _TOKENIZER_FILES:
            for file in tokenizer.glob(pattern):
                shutil.copy(file, folder / file.name)
    return _special_tokens(tokenizer)


def _special_tokens(tokenizer: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except Exception as error:  # a dozen kinds for a damaged tokenizer
        reason = first_line(error)
        raise LETError(f"The tokenizer {tokenizer} cannot be read ({reason}).") from error
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: value for name in names if (value := getattr(loaded, name)) is not None}


@dataclass(frozen=True)
class MegatronLayout:
    """What a converted checkpoint is meant for.

    torch_dist checkpoints load under any layout; this one is checked, and decides the padding.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    vocab_divisible_by: int = 128


def to_megatron_checkpoint(
    weights: Weights,
    output: Path,
    dtype: torch.dtype | None = None,
    layout: MegatronLayout = MegatronLayout(),
    force: bool = False,
) -> None:
    """Write a checkpoint folder that Megatron loads with `--load`, as weights to start from.

    It is a release checkpoint in Megatron's sense: iteration 0, no optimizer, no random states.

    Args:
        dtype: of the weights; None keeps the source's.

    Raises:
        LETError: the layout does not fit the model, or `output` exists; nothing is left behind.
    """
    check_layout(weights.llama, layout.tensor_parallel, layout.pipeline_parallel)
    refuse_unused(weights)
    dtype = dtype or weights.dtype
    args = _release_arguments(weights, dtype, layout)
    shards = [_shard(weights, b, dtype, args.padded_vocab_size) for b in blocks(weights.llama)]
    objects: dict[str, Any] = {COMMON_STATE: [_common_state(args)]}
    objects |= {name: [None] for name in _extra_states(weights.llama.num_layers)}
    with atomic_folder(output, force) as folder:
        write_torch_dist(folder / "release", shards, objects)
        (folder / TRACKER).write_text("release\n")


def _extra_states(num_layers: int) -> list[str]:
    stacked = [
        f"{name}._extra_state/shard_{layer}_{num_layers}"
        for name in EXTRA_STATES
        for layer in range(num_layers)
    ]
    return stacked + [f"{name}._extra_state/shard_0_1" for name in EXTRA_STATES_ONCE]


def _shard(weights: Weights, block: Block, dtype: torch.dtype, rows: int) -> Shard:
    shape = (rows, *block.shape[1:]) if block.kind == "vocabulary" else block.shape
    size = shape if block.layer is None else (weights.llama.num_layers, *shape)
    read = functools.partial(_megatron_tensor, weights, block, shape[0])
    return Shard(block.megatron[0], size, block.layer, dtype, read)


def _megatron_tensor(weights: Weights, block: Block, rows: int) -> torch.Tensor:
    """Read what a block is made of and put it together; padded rows are 0."""
    tensor = merge(block, tuple(weights.read(name) for name in block.names), weights.llama)
    missing = rows - tensor.shape[0]
    padding = (0, 0) * (tensor.dim() - 1) + (0, missing)
    return torch.nn.functional.pad(tensor, padding) if missing else tensor


def _release_arguments(
    weights: Weights, dtype: torch.dtype, layout: MegatronLayout
) -> argparse.Namespace:
    """Arguments that Megatron compares a run with, or takes by `--use-checkpoint-args`."""
    llama: Llama = weights.llama
    rows = padded_vocab_size(llama.vocab_size, layout.vocab_divisible_by, layout.tensor_parallel)
    values = to_megatron(llama) | {
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": layout.vocab_divisible_by,
        "tensor_model_parallel_size": layout.tensor_parallel,
        "pipeline_model_parallel_size": layout.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": None,
        "seq_length": llama.max_positions,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": dtype,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    if weights.tokenizer is not None:
        kind = "SentencePieceTokenizer" if weights.tokenizer.is_file() else "HuggingFaceTokenizer"
        values |= {"tokenizer_type": kind, "tokenizer_model": str(weights.tokenizer)}
    return argparse.Namespace(**values)


def _common_state(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
