"""Tokenizers of GGUF files: text is split as the pre-tokenizer that the file names splits it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_let.errors import LETError
from megatron_let.teacher.gguf import convert_gguf
from megatron_let.teacher.tokenizer import PROBE_TEXTS, encoder_of, read_tokenizer
from tests.helpers.checkpoints import save_llama
from tests.helpers.gguf_file import save_gguf

pytestmark = pytest.mark.medium

END = "<end>"
# In the vocabulary, and not the result of merges.
WHOLE_WORD = "Ġxyzzy"
TEXTS = (
    *PROBE_TEXTS,
    "1 22 333 4444 55555 666666",
    "IT'S we'LL",
    "a\n\n  b ²³ ¼",
    " xyzzy",
    "x  \n y",
)


def byte_level(use_regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split_by(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, byte_level(False)])


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": byte_level(True),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level(True)]),
    "llama-bpe": split_by(LLAMA3),
    "qwen2": split_by(LLAMA3.replace("{1,3}", "")),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=1, vocab_size=360)
    return AutoModelForCausalLM.from_pretrained(folder)


def tokenizer_of(pre: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of 360 tokens whose merges join digits, spaces and letters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level(False)
    tokenizer.train_from_iterator(
        [text * 20 for text in TEXTS],
        trainers.BpeTrainer(
            vocab_size=359,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"][WHOLE_WORD] = 359
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.model.ignore_merges = pre == "llama-bpe"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_text_is_split_as_the_file_names(
    pre: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_LET_CACHE", str(tmp_path / "cache"))
    tokenizer = tokenizer_of(pre)
    file = save_gguf(tmp_path / "m.gguf", model, pre=pre, tokenizer=tokenizer)
    found = encoder_of(read_tokenizer(convert_gguf(file)))
    for text in TEXTS:
        assert found(text) == encoder_of(tokenizer)(text), text
    others = [encoder_of(tokenizer_of(name)) for name in PRE_TOKENIZERS if name != pre]
    assert all(any(found(text) != other(text) for text in TEXTS) for other in others)


@pytest.mark.parametrize("pre", [None, "default", "klingon"])
def test_unknown_pre_tokenizer_is_refused(
    pre: str | None, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_LET_CACHE", str(tmp_path / "cache"))
    file = save_gguf(tmp_path / "m.gguf", model, pre=pre)
    with pytest.raises(LETError, match=r"tokenizer\.ggml\.pre"):
        convert_gguf(file)
    assert not list(tmp_path.glob("cache/teachers/*/config.json"))


def sentence_piece_of(**options: Any) -> SentencePieceProcessor:
    """Return a model of up to 420 pieces that replaces nothing but spaces."""
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([text * 20 for text in TEXTS]), model_writer=written,
        vocab_size=420, model_type="bpe", byte_fallback=True, num_threads=1, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
        character_coverage=0.98, **options,
    )  # fmt: skip
    return SentencePieceProcessor(model_proto=written.getvalue())


@pytest.mark.parametrize("space_prefix", [None, True, False])
def test_ids_are_those_of_sentence_piece(
    space_prefix: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_LET_CACHE", str(tmp_path / "cache"))
    processor = sentence_piece_of(add_dummy_prefix=space_prefix is not False)
    folder = save_llama(tmp_path / "llama", num_hidden_layers=1, vocab_size=processor.vocab_size())
    model = AutoModelForCausalLM.from_pretrained(folder)
    file = save_gguf(
        tmp_path / "m.gguf", model, sentence_piece=processor, space_prefix=space_prefix
    )
    found = encoder_of(read_tokenizer(convert_gguf(file)))
    for text in (*TEXTS, "  two spaces", "\ttab", "\u2581 block"):
        assert found(text) == processor.encode(text), text


def test_user_defined_pieces_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_LET_CACHE", str(tmp_path / "cache"))
    processor = sentence_piece_of(user_defined_symbols=["<start>"])
    folder = save_llama(tmp_path / "llama", num_hidden_layers=1, vocab_size=processor.vocab_size())
    model = AutoModelForCausalLM.from_pretrained(folder)
    file = save_gguf(tmp_path / "m.gguf", model, sentence_piece=processor)
    with pytest.raises(LETError, match="user-defined token '<start>'"):
        convert_gguf(file)
