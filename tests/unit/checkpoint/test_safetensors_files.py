"""The streaming writer of safetensors, checked with the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_let.checkpoint.safetensors_files import (
    SafetensorsFolder,
    write_safetensors,
)

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(2000).bfloat16(),
    "c": torch.randn(7, 2).half(),
    "d": torch.randn(1),
}


@pytest.mark.parametrize("max_shard_size", [10**9, 200, 64], ids=["one file", "2 shards", "each"])
def test_written_files_are_read_by_safetensors(tmp_path: Path, max_shard_size: int) -> None:
    write_safetensors(tmp_path, TENSORS, TENSORS.__getitem__, max_shard_size)
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {name: t for file in files for name, t in load_file(file).items()}
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in TENSORS.items())
    assert (len(files) == 1) == (max_shard_size == 10**9)
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == TENSORS.keys()
    ours = SafetensorsFolder(tmp_path)
    assert all(torch.equal(ours.read(name), tensor) for name, tensor in TENSORS.items())


def test_tensor_of_another_shape_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a is"):
        write_safetensors(tmp_path, {"a": torch.empty(5, 3)}, TENSORS.__getitem__, "1GB")
