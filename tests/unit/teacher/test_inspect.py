"""Checks of a model folder that do not load it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
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
from megatron_let.teacher.inspect import TeacherFolder, inspect_teacher
from tests.helpers.models import MAX_POSITIONS, NUM_LAYERS, VOCAB_SIZE, save_teacher

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = BertConfig(**SMALL, intermediate_size=64, max_position_embeddings=64)
T5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
BART = BartConfig(
    vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
    decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4,
)  # fmt: skip


@pytest.fixture
def copy(teacher: Path, tmp_path: Path) -> Path:
    """A copy of the teacher that a test may change."""
    return shutil.copytree(teacher, tmp_path / "copy")


def refused(teacher: Path) -> str:
    """Return the error message, which is one sentence that names the teacher."""
    with pytest.raises(LETError) as error:
        inspect_teacher(teacher)
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), message
    assert str(teacher) in message
    return message


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


@pytest.mark.parametrize("kind", ["xlnet", "prophetnet"])
def test_model_of_another_order_raises(kind: str, tmp_path: Path) -> None:
    # transformers lists causal classes for both.
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    message = refused(tmp_path)
    assert f"is a {kind} model" in message and "from left to right" in message


def test_folder_without_weights_raises(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "weight file" in refused(copy)


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
    left = list((tmp_path / "cache" / "teachers").iterdir())
    assert {path.suffix for path in left} == {".lock", ".digest"}
    assert not any(path.is_dir() for path in left)


def test_quantised_model_raises(copy: Path) -> None:
    path = copy / "config.json"
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantized}))
    message = refused(copy)
    assert "quantization_config" in message and "bitsandbytes" in message
