"""A teacher's folder is checked without loading it, and what is wrong with it is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from megatron_let.teacher.inspect import (
    TeacherFolder,
    check_weight_files,
    default_cache,
    inspect_teacher,
)
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
    """A copy of the teacher to break."""
    return shutil.copytree(llama, tmp_path / "copy")


def refused(teacher: Path, **values: Any) -> str:
    with pytest.raises(LETError) as error:
        inspect_teacher(teacher, **values)
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), message
    assert str(teacher) in message, "which teacher"
    return message


def sharded(folder: Path, index: str, names: list[str]) -> None:
    """Name shards in an index, as `save_pretrained` does for a large model."""
    weight_map = {f"tensor{i}": name for i, name in enumerate(names)}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Teachers that pass


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox", "gpt2"])
def test_sizes_of_a_teacher_whatever_its_config_calls_them(
    architecture: str, tmp_path: Path
) -> None:
    path = save_teacher(tmp_path / architecture, architecture)
    expected = TeacherFolder(path, NUM_LAYERS, 48, VOCAB_SIZE, MAX_POSITIONS)
    assert inspect_teacher(path) == expected


def test_teacher_without_a_limit_of_positions(tmp_path: Path) -> None:
    BloomForCausalLM(
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    ).save_pretrained(tmp_path)
    assert inspect_teacher(tmp_path).max_positions is None


def test_shards_of_an_index_pass(copy: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        shutil.copy(copy / "model.safetensors", copy / name)
    (copy / "model.safetensors").unlink()
    sharded(copy, "model.safetensors.index.json", names)
    inspect_teacher(copy)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_bin_file_of_either_torch_format_passes(copy: Path, zipped: bool) -> None:
    (copy / "model.safetensors").unlink()
    weights = {"weight": torch.ones(40)}
    torch.save(weights, copy / BIN, _use_new_zipfile_serialization=zipped)
    inspect_teacher(copy)


def test_single_safetensors_file_wins_over_a_leftover_index(copy: Path) -> None:
    """transformers reads model.safetensors; a download often leaves the .bin shards out."""
    sharded(copy, "pytorch_model.bin.index.json", ["pytorch_model-00001-of-00002.bin"])
    inspect_teacher(copy)


# No model


def test_missing_teacher(tmp_path: Path) -> None:
    assert "does not exist; give --let-teacher a model folder" in refused(tmp_path / "none")


def test_folder_without_a_config(tmp_path: Path) -> None:
    assert "has no config.json" in refused(tmp_path)


@pytest.mark.parametrize(
    "config",
    ["{", "", "{}", "[]", "null", '"llama"', '{"model_type": "frobnicate"}', '{"model_type": 3}'],
)
def test_config_of_no_known_model(copy: Path, config: str) -> None:
    (copy / "config.json").write_text(config)
    assert "has a config.json that is of no known model" in refused(copy)


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
def test_model_that_is_not_causal(
    make: Callable[[], PreTrainedModel], kind: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    assert f"is a {kind} model, which is no causal language model" in refused(tmp_path)


# Weight files


def test_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "has no weight file (*.safetensors or *.bin)" in refused(copy)


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("model.safetensors.index.json", "model-00002-of-00002.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model-00002-of-00002.bin"),
    ],
)
def test_shard_that_is_missing_is_named(copy: Path, index: str, shard: str) -> None:
    (copy / "model.safetensors").unlink()
    sharded(copy, index, [shard])
    assert f"{shard} is missing; copy the folder again" in refused(copy)


@pytest.mark.parametrize("content", ["", '{"weight_', "{}", "[]", '{"weight_map": []}'])
def test_damaged_index_is_named(copy: Path, content: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refused(copy)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for weight files that are cut again and again."""
    return tmp_path_factory.mktemp("cut")


def assert_cut_file_is_refused(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    expected = rf"{name} is cut short or damaged at {len(content)} bytes; copy it again\.$"
    with pytest.raises(LETError, match=expected):
        check_weight_files(folder)
    (folder / name).unlink()


@given(st.data())
def test_safetensors_file_of_any_shorter_length_is_refused(
    llama: Path, cut: Path, data: st.DataObject
) -> None:
    whole = (llama / "model.safetensors").read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 200))
    assert_cut_file_is_refused(cut, "model.safetensors", whole[:length])


@given(st.data())
def test_bin_file_of_any_shorter_length_is_refused(cut: Path, data: st.DataObject) -> None:
    torch.save({"first": torch.ones(100), "second": torch.ones(3, 7)}, cut / "whole")
    whole = (cut / "whole").read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1))
    assert_cut_file_is_refused(cut, BIN, whole[:length])


@pytest.mark.parametrize(
    "header",
    [b"[]", b"null", b"3", b'{"a": 1}', b'{"a": {}}', b'{"a": {"data_offsets": []}}', b"\xff\xff"],
)
def test_safetensors_header_that_is_none_is_refused(cut: Path, header: bytes) -> None:
    content = len(header).to_bytes(8, "little") + header
    assert_cut_file_is_refused(cut, "model.safetensors", content)


@pytest.mark.parametrize("length", [2**31, 2**62, 2**64 - 1])
def test_safetensors_header_of_absurd_length_is_refused(cut: Path, length: int) -> None:
    content = length.to_bytes(8, "little") + b"{}"
    assert_cut_file_is_refused(cut, "model.safetensors", content)


def test_second_shard_is_looked_at_too(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (copy / "model.safetensors").rename(copy / names[0])
    (copy / names[1]).write_bytes(whole[:-1])
    sharded(copy, "model.safetensors.index.json", names)
    assert f"{names[1]} is cut short" in refused(copy)


# Single files


@pytest.mark.parametrize("name", ["model.safetensors", "teacher", "teacher.bin"])
def test_file_that_is_no_gguf(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"weights")
    assert "is a file but no .gguf" in refused(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"GGUF\x03\x00\x00\x00", b"no model at all " * 100],
    ids=["empty", "magic only", "version only", "text"],
)
def test_damaged_gguf_leaves_no_folder_behind(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "small.gguf"
    file.write_bytes(content)
    assert "cannot be read as GGUF" in refused(file, cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name != "teachers"
                and path.suffix != ".lock"]  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MEGATRON_LET_CACHE": "/c", "XDG_CACHE_HOME": "/x"}, "/c"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/megatron_let"),
        ({"XDG_CACHE_HOME": "", "MEGATRON_LET_CACHE": "", "HOME": "/h"}, "/h/.cache/megatron_let"),
    ],
)
def test_cache_follows_the_environment(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MEGATRON_LET_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_cache() == Path(expected)
