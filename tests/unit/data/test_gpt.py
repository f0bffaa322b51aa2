"""The check of a run's data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_let.data.gpt import check_data, check_token_ids
from megatron_let.errors import LETError
from tests.helpers.data import write_indexed
from tests.helpers.text_data import documents_of


def data_args(**values: Any) -> argparse.Namespace:
    common: dict[str, Any] = dict.fromkeys(
        ["data_path", "data_args_path", "per_split_data_args_path", "train_data_path",
         "valid_data_path", "test_data_path"]
    )  # fmt: skip
    run = {"mock_data": False, "split": "1,0,0", "eval_iters": 1, "seq_length": 1,
           "skip_train": False}  # fmt: skip
    return argparse.Namespace(**common | run | values)


@pytest.fixture
def prefix(tmp_path: Path, tokenizer: Any) -> str:
    write_indexed(tmp_path / "text", ["one"], tokenizer)
    return str(tmp_path / "text")


def test_existing_data_passes(prefix: str) -> None:
    check_data(data_args(data_path=[prefix]))
    check_data(data_args(data_path=["0.3", prefix, "0.7", prefix]))
    check_data(data_args(train_data_path=[prefix], valid_data_path=[prefix]))
    check_data(data_args(mock_data=True))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"seq_length": 8}, r"The train split of .* has \d tokens, less than one"),
        ({"split": "1,1,0"}, "The .* split of .* has 0 tokens"),
        ({"split": "9,1,0", "eval_iters": 0}, "The validation split of .* has 0 tokens"),
        ({"split": "0,1,0", "eval_iters": 0, "seq_length": 8, "skip_train": True}, None),
    ],
)
def test_split_shorter_than_a_sequence_raises(
    values: dict[str, Any], expected: str | None, prefix: str
) -> None:
    args = data_args(data_path=[prefix], **values)
    if expected is None:
        check_data(args)
        return
    with pytest.raises(LETError, match=expected):
        check_data(args)


@pytest.mark.parametrize("where", ["data_path", "train_data_path", "valid_data_path"])
def test_missing_data_file_is_reported(where: str, prefix: str) -> None:
    named = {"train_data_path": [prefix]} | {where: ["/no/data"]}
    if where == "data_path":
        named = {where: ["0.5", prefix, "0.5", "/no/data"]}
    with pytest.raises(LETError, match=r"The data file /no/data\.bin does not exist"):
        check_data(data_args(**named))


def test_missing_index_is_reported(prefix: str) -> None:
    Path(prefix + ".idx").unlink()
    with pytest.raises(LETError, match=r"text\.idx does not exist"):
        check_data(data_args(data_path=[prefix]))


def test_run_without_data_raises() -> None:
    with pytest.raises(LETError, match="--data-path"):
        check_data(data_args())


@pytest.mark.parametrize("where", ["data_path", "valid_data_path"])
def test_run_without_training_data_raises(where: str, prefix: str) -> None:
    args = data_args(**{where: [prefix]}, split="0,1,0", eval_iters=0)
    with pytest.raises(LETError, match="leaves no data to train on"):
        check_data(args)


def test_negative_id_is_reported_before_training(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(f"{tmp_path}/text.bin", dtype=np.int32)
    builder.add_document(torch.tensor([1, -3, 2]), [3])
    builder.finalize(f"{tmp_path}/text.idx")
    with pytest.raises(LETError, match="text has token -3"):
        check_token_ids(data_args(data_path=[f"{tmp_path}/text"]), 256)


@pytest.mark.parametrize("where", ["data_path", "valid_data_path"])
def test_id_beyond_the_vocabulary_is_reported_before_training(where: str, prefix: str) -> None:
    args = data_args(**{where: [prefix]})
    largest = max(max(tokens) for tokens in documents_of(Path(prefix)))
    check_token_ids(args, largest + 1)
    with pytest.raises(LETError, match=f"text has token {largest}, .* {largest} tokens"):
        check_token_ids(args, largest)
    check_token_ids(data_args(mock_data=True), 1)
