"""Checks of a model folder that do not load it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from megatron_let.errors import LETError
from megatron_let.teacher.cache import default_cache
from megatron_let.teacher.inspect import TeacherFolder, inspect_teacher
from megatron_let.teacher.weight_files import check_weight_files
from tests.helpers.models import MAX_POSITIONS, NUM_LAYERS, VOCAB_SIZE, save_teacher

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = BertConfig(**SMALL, intermediate_size=64, max_position_embeddings=64)
T5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
BART = BartConfig(
    vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
    decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4,
)  # fmt: skip
BIN = "pytorch_model.bin"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teachers") / "llama")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy of the teacher that a test may change."""
    return shutil.copytree(llama, tmp_path / "copy")


def refused(teacher: Path) -> str:
    """Return the error message, which is one sentence that names the teacher."""
    with pytest.raises(LETError) as error:
        inspect_teacher(teacher)
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), message
    assert str(teacher) in message
    return message


def sharded(folder: Path, index: str, names: list[str]) -> None:
    """Write an index of shards, as `save_pretrained` does for a large model."""
    weight_map = {f"tensor{i}": name for i, name in enumerate(names)}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Valid teachers


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox", "gpt2"])
def test_sizes_are_read_from_config_of_any_architecture(architecture: str, tmp_path: Path) -> None:
    path = save_teacher(tmp_path / architecture, architecture)
    expected = TeacherFolder(path, NUM_LAYERS, 48, VOCAB_SIZE, MAX_POSITIONS)
    assert inspect_teacher(path) == expected


def test_config_without_position_limit_gives_none(tmp_path: Path) -> None:
    BloomForCausalLM(
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    ).save_pretrained(tmp_path)
    assert inspect_teacher(tmp_path).max_positions is None


def test_complete_shards_pass(copy: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        shutil.copy(copy / "model.safetensors", copy / name)
    (copy / "model.safetensors").unlink()
    sharded(copy, "model.safetensors.index.json", names)
    inspect_teacher(copy)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_bin_file_in_either_torch_format_passes(copy: Path, zipped: bool) -> None:
    (copy / "model.safetensors").unlink()
    weights = {"weight": torch.ones(40)}
    torch.save(weights, copy / BIN, _use_new_zipfile_serialization=zipped)
    inspect_teacher(copy)


def test_single_safetensors_file_wins_over_unused_index(copy: Path) -> None:
    """transformers reads model.safetensors; downloads often leave out the .bin shards."""
    sharded(copy, "pytorch_model.bin.index.json", ["pytorch_model-00001-of-00002.bin"])
    inspect_teacher(copy)


# Not a causal language model


def test_missing_teacher_raises(tmp_path: Path) -> None:
    assert "--let-teacher" in refused(tmp_path / "none")


def test_folder_without_config_raises(tmp_path: Path) -> None:
    assert "config.json" in refused(tmp_path)


@pytest.mark.parametrize(
    "config",
    ["{", "", "{}", "[]", "null", '"llama"', '{"model_type": "frobnicate"}', '{"model_type": 3}'],
)
def test_config_of_unknown_model_raises(copy: Path, config: str) -> None:
    (copy / "config.json").write_text(config)
    assert "config.json of an unknown model" in refused(copy)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: T5ForConditionalGeneration(T5), "t5"),
        (lambda: BartForConditionalGeneration(BART), "bart"),
        (lambda: BertModel(BERT), "bert"),
        (lambda: BertForMaskedLM(BERT), "bert"),
    ],
    ids=["encoder-decoder", "encoder-decoder with a causal class", "BERT", "BERT with its head"],
)
def test_model_that_is_not_causal_raises(
    make: Callable[[], PreTrainedModel], kind: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    assert f"is a {kind} model, not a causal language model" in refused(tmp_path)


# Weight files


def test_folder_without_weights_raises(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "has no weight file (*.safetensors or *.bin)" in refused(copy)


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("model.safetensors.index.json", "model-00002-of-00002.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model-00002-of-00002.bin"),
    ],
)
def test_missing_shard_is_named(copy: Path, index: str, shard: str) -> None:
    (copy / "model.safetensors").unlink()
    sharded(copy, index, [shard])
    assert f"{shard} is missing" in refused(copy)


@pytest.mark.parametrize("content", ["", '{"weight_', "{}", "[]", '{"weight_map": []}'])
def test_damaged_index_is_named(copy: Path, content: str) -> None:
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
def test_truncated_safetensors_file_raises(llama: Path, cut: Path, data: st.DataObject) -> None:
    whole = (llama / "model.safetensors").read_bytes()
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


def test_truncated_second_shard_is_named(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (copy / "model.safetensors").rename(copy / names[0])
    (copy / names[1]).write_bytes(whole[:-1])
    sharded(copy, "model.safetensors.index.json", names)
    assert f"{names[1]} is cut short" in refused(copy)


# Single files


@pytest.mark.parametrize("name", ["model.safetensors", "teacher", "teacher.bin"])
def test_file_that_is_not_gguf_raises(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"weights")
    assert ".gguf" in refused(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"GGUF\x03\x00\x00\x00", b"not a model " * 100],
    ids=["empty", "magic only", "version only", "text"],
)
def test_damaged_gguf_leaves_no_folder_behind(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_LET_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "small.gguf"
    file.write_bytes(content)
    assert "GGUF" in refused(file)
    assert {path.suffix for path in (tmp_path / "cache" / "teachers").iterdir()} == {".lock"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MEGATRON_LET_CACHE": "/c", "XDG_CACHE_HOME": "/x"}, "/c"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/megatron_let"),
        ({"XDG_CACHE_HOME": "", "MEGATRON_LET_CACHE": "", "HOME": "/h"}, "/h/.cache/megatron_let"),
    ],
)
def test_cache_follows_environment(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MEGATRON_LET_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_cache() == Path(expected)
