"""Exported tokenizers give the ids of the run's, by SentencePiece and tokenizers as peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from megatron_let.checkpoint.convert import to_megatron_checkpoint
from megatron_let.checkpoint.tokenizer_files import write_tokenizer
from megatron_let.checkpoint.weights import open_weights
from megatron_let.cli.convert import main
from megatron_let.errors import LETError
from megatron_let.teacher.tokenizer import PROBE_TEXTS
from tests.helpers.checkpoints import as_megatron, save_llama, with_tokenizer
from tests.helpers.text_data import (
    real_texts,
    save_hugging_face_tokenizer,
    save_sentence_piece,
)

pytestmark = pytest.mark.medium

SENTENCE_PIECE: dict[str, dict[str, Any]] = {
    "as Llama's": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "as Gemma's": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                   "add_dummy_prefix": False, "user_defined_symbols": ["<start>", "\n\n"]},
    "as T5's": {"model_type": "unigram", "byte_fallback": False, "vocab_size": 700},
    "as the trainer's default": {},
}  # fmt: skip
# transformers splits "\r\n" differently after this normalisation.
NOT_EXPORTABLE = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": False}


@pytest.fixture(autouse=True)
def keep_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command hides the GPUs of its process."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def folder_with_config(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


def run_with(tokenizer: Path, folder: Path) -> Path:
    """Return a checkpoint of 600 tokens that names a SentencePiece model as its tokenizer."""
    source = save_llama(folder / "llama", vocab_size=600)
    to_megatron_checkpoint(open_weights(source, tokenizer), folder / "megatron")
    return folder / "megatron"


@pytest.mark.parametrize("kind", SENTENCE_PIECE)
def test_exported_sentence_piece_gives_its_ids(kind: str, tmp_path: Path) -> None:
    model = save_sentence_piece(tmp_path / "tokenizer.model", **SENTENCE_PIECE[kind])
    folder = folder_with_config(tmp_path / "out")
    write_tokenizer(model, folder)
    theirs, ours = SentencePieceProcessor(str(model)), AutoTokenizer.from_pretrained(folder)
    assert len(ours) == len(theirs) and ours.eos_token_id == theirs.eos_id()
    # Splits of a unigram model can have equal scores, and the libraries choose differently then.
    more = real_texts()[: 0 if kind == "as T5's" else 40]
    for text in (*PROBE_TEXTS, *more):
        assert ours(text).input_ids == theirs.encode(text), text


def test_command_refuses_a_tokenizer_that_transformers_splits_differently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_sentence_piece(tmp_path / "tokenizer.model", **NOT_EXPORTABLE)
    checkpoint, output = run_with(model, tmp_path), tmp_path / "out"
    assert main(["megatron-to-hf", "--input", str(checkpoint), "--output", str(output)]) == 2
    assert str(model) in capsys.readouterr().err and not output.exists()


def test_folder_whose_files_need_its_config_gives_its_ids(tmp_path: Path) -> None:
    source = save_hugging_face_tokenizer(tmp_path / "source")
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "gpt2"}')
    (bare / "vocab.json").write_text(json.dumps(model["vocab"]))
    (bare / "merges.txt").write_text("\n".join(map(" ".join, model["merges"])))
    folder = folder_with_config(tmp_path / "out")
    write_tokenizer(bare, folder)
    theirs, ours = (AutoTokenizer.from_pretrained(path) for path in (source, folder))
    for text in PROBE_TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text


def test_tokenizer_with_other_ids_than_the_runs_is_refused(tmp_path: Path) -> None:
    model = save_sentence_piece(tmp_path / "tokenizer.model")
    checkpoint = run_with(model, tmp_path)
    with pytest.raises(LETError, match=r"tokenizer\.model"):
        open_weights(checkpoint, save_hugging_face_tokenizer(tmp_path / "other"))
    equal = folder_with_config(tmp_path / "equal")
    write_tokenizer(model, equal)
    assert open_weights(checkpoint, equal).tokenizer == equal


def test_list_of_end_tokens_is_kept_in_a_round_trip(tmp_path: Path) -> None:
    source = with_tokenizer(save_llama(tmp_path / "source", vocab_size=600))
    GenerationConfig(eos_token_id=[7, 0, 8]).save_pretrained(source)
    checkpoint, output = as_megatron(source, tmp_path / "megatron"), tmp_path / "out"
    assert main(["megatron-to-hf", "--input", str(checkpoint), "--output", str(output)]) == 0
    assert GenerationConfig.from_pretrained(output).eos_token_id == [7, 0, 8]
    assert AutoConfig.from_pretrained(output).eos_token_id == [7, 0, 8]


def test_generation_settings_are_kept_in_a_round_trip(tmp_path: Path) -> None:
    source = with_tokenizer(save_llama(tmp_path / "source", vocab_size=600))
    GenerationConfig(
        eos_token_id=[0, 7], pad_token_id=9, temperature=0.6, top_p=0.9, do_sample=True
    ).save_pretrained(source)
    checkpoint, output = as_megatron(source, tmp_path / "megatron"), tmp_path / "out"
    assert main(["megatron-to-hf", "--input", str(checkpoint), "--output", str(output)]) == 0
    theirs, ours = (GenerationConfig.from_pretrained(path) for path in (source, output))
    names = ("temperature", "top_p", "do_sample", "pad_token_id")
    assert [getattr(ours, n) for n in names] == [getattr(theirs, n) for n in names]
    assert ours.pad_token_id == AutoConfig.from_pretrained(output).pad_token_id == 9
    assert not hasattr(AutoConfig.from_pretrained(output), "temperature")
