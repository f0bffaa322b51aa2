"""Convert between Megatron checkpoints and Hugging Face folders, one tensor at a time."""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_let.checkpoint.architecture import Architecture, to_megatron
from megatron_let.checkpoint.model_types import model_type_of, to_hugging_face
from megatron_let.checkpoint.parameter_mapping import (
    ParameterMapping,
    extra_states,
    merge,
    parameter_mappings,
    unstacked,
)
from megatron_let.checkpoint.safetensors_files import write_safetensors
from megatron_let.checkpoint.tokenizer_files import (
    SPECIAL_TOKENS,
    generation_settings,
    write_tokenizer,
)
from megatron_let.checkpoint.torch_dist import COMMON_STATE, Shard, write_torch_dist
from megatron_let.checkpoint.weights import Weights
from megatron_let.config.arguments import padded_vocab_size
from megatron_let.errors import LETError
from megatron_let.files.atomic import atomic_folder, check_separate, write_json
from megatron_let.files.names import TRACKER
from megatron_let.planner.layouts import does_not_divide
from megatron_let.planner.memory import Layout

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def to_hugging_face_folder(
    weights: Weights,
    output: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    force: bool = False,
) -> None:
    """Write a Hugging Face folder: config, generation config, safetensors, tokenizer.

    Args:
        dtype: type of the written weights; None keeps the checkpoint's.
        max_shard_size: bytes, or text such as `5GB`.
        force: replace an existing `output`.

    Raises:
        LETError: a tensor that is not part of the model, a tokenizer for which transformers gives
            other ids, or `output` exists or overlaps what is read; nothing is written.
    """
    check_separate(output, weights.folder, weights.tokenizer)
    _check_all_used(weights)
    dtype = dtype or weights.dtype
    plan = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for mapping in parameter_mappings(weights.architecture)
        for name, shape in mapping.tensors
    }
    with atomic_folder(output, force) as folder:
        config = to_hugging_face(weights.architecture, str(dtype).removeprefix("torch."))
        write_json(folder / "config.json", config)
        generation: dict[str, Any] = {}
        if weights.tokenizer is not None:
            loaded = write_tokenizer(weights.tokenizer, folder)
            generation = generation_settings(weights.tokenizer, loaded)
        # Without a value, Llama's and Mixtral's configs have that of another tokenizer.
        special = {name: generation.get(name) for name in SPECIAL_TOKENS}
        write_json(folder / "config.json", config | special)
        write_json(folder / "generation_config.json", generation)
        write_safetensors(folder, plan, weights.read, max_shard_size)


def _check_all_used(weights: Weights) -> None:
    """Check that a conversion would drop no tensor.

    Raises:
        LETError: names one of the tensors.
    """
    unused = weights.unused()
    if unused:
        raise LETError(
            f"{weights.folder} has {len(unused)} tensors that are not part of a"
            f" {model_type_of(weights.architecture).name} model, such as {unused[0]}; it is another"
            " architecture."
        )


@dataclass(frozen=True)
class MegatronLayout:
    """The parallel layout that a converted checkpoint is intended for.

    torch_dist checkpoints load under any layout; this one is checked, and sets the padding.
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
    """Write a checkpoint folder that Megatron loads with `--load`, as initial weights.

    It is a release checkpoint in Megatron's terms: iteration 0, no optimizer, no random states.

    Args:
        dtype: type of the written weights; None keeps the source's.
        force: replace an existing `output`.

    Raises:
        LETError: the layout does not fit the model, or `output` exists or overlaps what is read;
            nothing is written.
    """
    check_separate(output, weights.folder, weights.tokenizer)
    parallel = Layout(layout.tensor_parallel, layout.pipeline_parallel, 1, 1, 1, 1, 1)
    problem = does_not_divide(parallel, weights.architecture)
    if problem is not None:
        raise LETError(problem)
    _check_all_used(weights)
    dtype = dtype or weights.dtype
    args = _release_arguments(weights, dtype, layout)
    rows, mappings = args.padded_vocab_size, parameter_mappings(weights.architecture)
    shards = [shard for mapping in mappings for shard in _shards(weights, mapping, dtype, rows)]
    objects: dict[str, Any] = {COMMON_STATE: [_common_state(args)]}
    objects |= {name: [None] for name in extra_states(weights.architecture)}
    with atomic_folder(output, force) as folder:
        write_torch_dist(folder / "release", shards, objects)
        (folder / TRACKER).write_text("release\n")


def _shards(
    weights: Weights, mapping: ParameterMapping, dtype: torch.dtype, rows: int
) -> list[Shard]:
    """Return one of Megatron's tensors as a shard, or as two of equal values.

    The norm before experts has another name with Megatron's local layers than with Transformer
    Engine's; a run ignores the name that it does not have.
    """
    architecture = weights.architecture
    shape = (rows, *mapping.shape[1:]) if mapping.kind == "vocabulary" else mapping.shape
    index = mapping.index
    axes: tuple[int, ...] = (architecture.num_layers, architecture.num_experts)
    names = mapping.megatron[: 2 if mapping.megatron[0].endswith("pre_mlp_layernorm.weight") else 1]
    if mapping.layer is not None and architecture.dense_layers:
        names, index, axes = unstacked(mapping)[: len(names)], index[1:], axes[1:]
    size = (*axes[: len(index)], *shape)
    read = functools.partial(_megatron_tensor, weights, mapping, shape[0])
    return [Shard(name, size, index, dtype, read) for name in names]


def _megatron_tensor(weights: Weights, mapping: ParameterMapping, rows: int) -> torch.Tensor:
    """Read and merge the parts of one of Megatron's tensors; padded rows are 0."""
    tensor = merge(
        mapping, tuple(weights.read(name) for name in mapping.names), weights.architecture
    )
    missing = rows - tensor.shape[0]
    padding = (0, 0) * (tensor.dim() - 1) + (0, missing)
    return torch.nn.functional.pad(tensor, padding) if missing else tensor


def _release_arguments(
    weights: Weights, dtype: torch.dtype, layout: MegatronLayout
) -> argparse.Namespace:
    """Return arguments that Megatron compares with a run's, or uses by `--use-checkpoint-args`."""
    architecture: Architecture = weights.architecture
    rows = padded_vocab_size(
        architecture.vocab_size, layout.vocab_divisible_by, layout.tensor_parallel
    )
    values = to_megatron(architecture) | {
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": layout.vocab_divisible_by,
        "tensor_model_parallel_size": layout.tensor_parallel,
        "pipeline_model_parallel_size": layout.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": None,
        "seq_length": architecture.max_positions,
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
        values |= {"tokenizer_type": kind, "tokenizer_model": str(weights.tokenizer.resolve())}
    return argparse.Namespace(**values)


def _common_state(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
