"""Checks that weight files are complete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_let.errors import LETError
from megatron_let.teacher.weight_files import check_weight_files

BIN = "pytorch_model.bin"


@pytest.fixture
def copy(teacher: Path, tmp_path: Path) -> Path:
    """A copy of a teacher that a test may change."""
    return shutil.copytree(teacher, tmp_path / "copy")


def refused(folder: Path) -> str:
    """Return the error message, which is one sentence that names the folder."""
    with pytest.raises(LETError) as error:
        check_weight_files(folder)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and str(folder) in message, message
    return message


def sharded(folder: Path, index: str, names: list[str]) -> None:
    """Write an index of shards, as `save_pretrained` does for a large model."""
    weight_map = {f"tensor{i}": name for i, name in enumerate(names)}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_complete_shards_pass(copy: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        shutil.copy(copy / "model.safetensors", copy / name)
    (copy / "model.safetensors").unlink()
    sharded(copy, "model.safetensors.index.json", names)
    check_weight_files(copy)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_bin_file_in_either_torch_format_passes(copy: Path, zipped: bool) -> None:
    (copy / "model.safetensors").unlink()
    weights = {"weight": torch.ones(40)}
    torch.save(weights, copy / BIN, _use_new_zipfile_serialization=zipped)
    check_weight_files(copy)


def test_single_safetensors_file_wins_over_unused_index(copy: Path) -> None:
    """transformers reads model.safetensors; downloads often leave out the .bin shards."""
    sharded(copy, "pytorch_model.bin.index.json", ["pytorch_model-00001-of-00002.bin"])
    check_weight_files(copy)


def test_folder_without_weights_raises(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "model.safetensors or pytorch_model.bin" in refused(copy)


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("model.safetensors.index.json", "model-00002-of-00002.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model-00002-of-00002.bin"),
    ],
)
def test_missing_shard_is_reported(copy: Path, index: str, shard: str) -> None:
    (copy / "model.safetensors").unlink()
    sharded(copy, index, [shard])
    assert f"{shard} is missing" in refused(copy)


@pytest.mark.parametrize("content", ["", '{"weight_', "{}", "[]", '{"weight_map": []}'])
def test_damaged_index_is_reported(copy: Path, content: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refused(copy)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for truncated weight files."""
    return tmp_path_factory.mktemp("cut")


def assert_damaged_file_raises(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(LETError, match=rf"{name} .* {len(content)} bytes"):
        check_weight_files(folder)
    (folder / name).unlink()


@given(st.data())
def test_truncated_safetensors_file_raises(teacher: Path, cut: Path, data: st.DataObject) -> None:
    whole = (teacher / "model.safetensors").read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 200))
    assert_damaged_file_raises(cut, "model.safetensors", whole[:length])


@given(st.data())
def test_truncated_bin_file_raises(cut: Path, data: st.DataObject) -> None:
    torch.save({"first": torch.ones(100), "second": torch.ones(3, 7)}, cut / "whole")
    whole = (cut / "whole").read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1))
    assert_damaged_file_raises(cut, BIN, whole[:length])


@pytest.mark.parametrize(
    "header",
    [b"[]", b"null", b"3", b'{"a": 1}', b'{"a": {}}', b'{"a": {"data_offsets": []}}', b"\xff\xff"],
)
def test_invalid_safetensors_header_raises(cut: Path, header: bytes) -> None:
    content = len(header).to_bytes(8, "little") + header
    assert_damaged_file_raises(cut, "model.safetensors", content)


@pytest.mark.parametrize("length", [2**31, 2**62, 2**64 - 1])
def test_safetensors_header_longer_than_file_raises(cut: Path, length: int) -> None:
    content = length.to_bytes(8, "little") + b"{}"
    assert_damaged_file_raises(cut, "model.safetensors", content)


def test_truncated_second_shard_is_reported(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (copy / "model.safetensors").rename(copy / names[0])
    (copy / names[1]).write_bytes(whole[:-1])
    sharded(copy, "model.safetensors.index.json", names)
    assert f"{names[1]} is cut short" in refused(copy)
