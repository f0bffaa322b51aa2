"""GPT datasets and batches by Megatron's builders, and the check of a run's data."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_let.data.indexed import open_indexed
from megatron_let.data.token_alignment import TokenAlignedDataset, TokenAligner
from megatron_let.data.wrapper import RepeatedDataset
from megatron_let.errors import LETError

_CHECKED_TOKENS = 2**20
_BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    """Return the dataset settings of Megatron's arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        full_validation=args.full_validation,
        multiple_validation_sets=args.multiple_validation_sets,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        object_storage_cache_path=args.object_storage_cache_path,
        sequences_per_dataset=_sequences_per_dataset(args),
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )


def _sequences_per_dataset(args: argparse.Namespace) -> dict[str, Any] | None:
    path = args.per_dataset_sequences_path
    return None if path is None else json.loads(Path(path).read_text())


def datasets_provider(
    args: argparse.Namespace, aligner: TokenAligner | None = None
) -> Callable[..., Any]:
    """Return the provider that `pretrain()` calls with (train, validation, test) sample counts.

    Args:
        aligner: adds the teacher's tokens to the training samples.
    """

    def provider(num_samples: list[int], vp_stage: int | None = None) -> Any:
        def built_on_this_rank() -> bool:
            return parallel_state.get_tensor_model_parallel_rank() == 0 and (
                args.reset_attention_mask or is_first_or_last_pipeline_stage(vp_stage)
            )

        kind = MockGPTDataset if args.mock_data else GPTDataset
        train, valid, test = BlendedMegatronDatasetBuilder(
            kind, num_samples, built_on_this_rank, dataset_config(args)
        ).build()
        if aligner is not None and train is not None and parallel_state.is_pipeline_first_stage():
            train = TokenAlignedDataset(train, aligner)
        return train, same_samples(args, valid), test

    provider.is_distributed = True  # type: ignore[attr-defined]
    return provider


def same_samples(args: argparse.Namespace, valid: Any) -> Any:
    """Return the validation set, or several, so that each evaluation is of the same samples."""
    if isinstance(valid, list):
        return [same_samples(args, one) for one in valid]
    if valid is None:
        return None
    if args.full_validation:
        # Of samples that do not fill all ranks, Megatron's ranks would read others each time.
        ranks = parallel_state.get_data_parallel_world_size()
        length = max(len(valid) // ranks * ranks, 1)
        return RepeatedDataset(valid, length, length)
    if args.dataloader_type != "single":
        # A shuffling sampler has an order of its own.
        return valid
    period = args.eval_iters * args.eval_global_batch_size
    # An evaluation that was interrupted, or another period before, leaves a part of one.
    start = 0 if args.skip_train else args.consumed_valid_samples
    return RepeatedDataset(valid, period, len(valid), start)


def get_batch(
    data_iterator: Any,
    args: argparse.Namespace,
    vp_stage: int | None,
    micro_batch_size: int,
) -> dict[str, torch.Tensor | None]:
    """Return this rank's share of the next microbatch.

    Args:
        data_iterator: used on the first rank of each tensor-parallel group.
        vp_stage: stage of an interleaved pipeline.
        micro_batch_size: samples of the microbatch, which evaluation may set on its own.

    Returns:
        `tokens`, `labels`, `loss_mask`, `position_ids` [b, s / cp] and `attention_mask`
        [b, 1, s / cp, s], true where a token is not attended to; None what a stage does not need.
    """
    is_middle = not is_first_or_last_pipeline_stage(vp_stage)
    if is_middle and not args.reset_attention_mask:
        return dict.fromkeys(_BATCH_KEYS)
    is_last = parallel_state.is_pipeline_last_stage()
    batch: dict[str, Any] = {}
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        microbatch = next(data_iterator)
        check_batch(microbatch)
        for key in _BATCH_KEYS:
            value = microbatch.get(key)
            batch[key] = None if value is None else value.cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=bool(args.mtp_num_layers) and is_last,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        # To a middle stage Megatron broadcasts no mask; what else it gets here is dropped.
        is_pipeline_first_stage=not is_last,
        is_pipeline_last_stage=is_last,
    )
    keys = ("attention_mask",) if is_middle else _BATCH_KEYS
    return get_batch_on_this_cp_rank(
        {key: batch.get(key) if key in keys else None for key in _BATCH_KEYS},
        is_hybrid_cp=False,
        cp_group=parallel_state.get_context_parallel_group(),
    )


def check_data(args: argparse.Namespace) -> None:
    """Check the indexed data before anything is built.

    Raises:
        LETError: no data is given, or none for training (Megatron would take no step); a file is
            missing; or a split that the run samples holds less than one sequence (Megatron would
            repeat it endlessly, or fail to open it).
    """
    if args.mock_data:
        return
    blend, per_split = get_blend_and_blend_per_split(args)
    if blend is None and per_split is None:
        raise LETError("No data is given; set --data-path to the prefix of an indexed data set.")
    samples = {"train": True, "validation": args.eval_iters != 0, "test": args.eval_iters != 0}
    if blend is not None:
        weights = [float(weight) for weight in re.split("[,/]", args.split)]
        weights = [*weights, 0.0, 0.0][:3]
        _check_trains(args, weights[0] > 0, f"--split {args.split}")
        for prefix in blend[0]:
            _check_prefix(prefix, weights, samples, args.seq_length)
        return
    _check_trains(args, per_split[0] is not None, "The data given per split")
    for index, (name, part) in enumerate(zip(samples, per_split, strict=True)):
        for prefix in part[0] if part is not None else ():
            whole = [1.0 if i == index else 0.0 for i in range(3)]
            _check_prefix(prefix, whole, {**samples, name: True}, args.seq_length)


def _check_trains(args: argparse.Namespace, has_training_data: bool, source: str) -> None:
    if not has_training_data and not args.skip_train:
        raise LETError(
            f"{source} leaves no data to train on; give some, or --skip-train to evaluate only."
        )


def check_token_ids(args: argparse.Namespace, vocab_size: int) -> None:
    """Check the ids at the beginning of each data set; `get_batch` checks the others.

    Beyond the vocabulary Megatron fails in the embedding, or takes a zero vector under TP.

    Raises:
        LETError: an id is not in the vocabulary.
    """
    if args.mock_data:
        return
    blend, per_split = get_blend_and_blend_per_split(args)
    parts = [part for part in (blend, *(per_split or ())) if part is not None]
    for prefix in {prefix for part in parts for prefix in part[0]}:
        dtype = open_indexed(prefix).index.dtype
        tokens = np.fromfile(f"{prefix}.bin", dtype=dtype, count=_CHECKED_TOKENS)
        ids = int(tokens.min(initial=0)), int(tokens.max(initial=0))
        _check_ids(*ids, vocab_size, prefix)


def check_batch(microbatch: dict[str, torch.Tensor]) -> None:
    """Check the ids of a microbatch on the host, like `check_token_ids`."""
    smallest = int(microbatch["tokens"].numpy().min())
    largest = max(int(microbatch[key].numpy().max()) for key in ("tokens", "labels"))
    _check_ids(smallest, largest, get_tokenizer().vocab_size, "The next microbatch")


def _check_ids(smallest: int, largest: int, vocab_size: int, data: str) -> None:
    if smallest < 0 or largest >= vocab_size:
        token = smallest if smallest < 0 else largest
        raise LETError(
            f"{data} has token {token}, and the run's tokenizer has {vocab_size} tokens; give the"
            " --tokenizer-model (or --vocab-size) that the data was made with."
        )


def _check_prefix(
    prefix: str, weights: list[float], samples: dict[str, bool], sequence_length: int
) -> None:
    dataset = open_indexed(prefix)  # kept: its arrays are views into its memory map
    lengths = dataset.sequence_lengths
    bounds = np.cumsum([0.0, *weights]) / sum(weights) * len(lengths)
    for (name, sampled), start, end in zip(samples.items(), bounds[:-1], bounds[1:], strict=True):
        documents = lengths[round(start) : round(end)]
        if end == start:
            continue
        # Megatron also builds a split that no step samples, and hangs if it has no document.
        needed = sequence_length if sampled else 0
        # A few documents usually suffice; read the whole index only if they do not.
        if documents[:10_000].sum() <= needed and documents.sum() <= needed:
            raise LETError(
                f"The {name} split of {prefix} has {int(documents.sum())} tokens, less than one"
                f" sequence of --seq-length {sequence_length} and its label; give more text or"
                " another --split."
            )
