"""Comparison of tokenizers: equal ones pass, otherwise the first difference is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.tokenizers import MegatronTokenizer
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_let.checkpoint.tokenizer_files import write_tokenizer
from megatron_let.errors import LETError
from megatron_let.teacher.tokenizer import (
    check_same_tokenizer,
    check_same_vocabulary,
    read_tokenizer,
)
from tests.helpers.models import save_teacher
from tests.helpers.text_data import save_sentence_piece

TEXT = ["def f(x):\n    return x + 1\n", "the end of the text, the end", "12345 naïve café"] * 20


def byte_level_bpe(text: list[str] = TEXT, vocab_size: int = 320) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<end>", "<begin>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<begin>"
    ).save_pretrained(folder)
    return folder


def student(folder: Path) -> Any:
    """Return Megatron's wrapper, as `--tokenizer-type HuggingFaceTokenizer` builds it."""
    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(folder), metadata_path={"library": "huggingface"}
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(byte_level_bpe(), tmp_path_factory.mktemp("tokenizers") / "plain")


def refused(ours: Path, theirs: Path) -> str:
    with pytest.raises(LETError) as error:
        check_same_tokenizer(student(ours), theirs)
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), message
    return message


def test_equal_tokenizers_pass(plain: Path, tmp_path: Path) -> None:
    check_same_tokenizer(student(plain), plain)
    again = save(byte_level_bpe(), tmp_path / "again")
    check_same_tokenizer(student(again), plain)


@pytest.mark.parametrize("template", ["<begin> $A", "$A <end>", "<begin> $A <end>"])
def test_special_tokens_around_text_are_ignored(tmp_path: Path, template: str) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<end>", 0), ("<begin>", 1)]
    )
    folder = save(tokenizer, tmp_path / "tokenizer")
    check_same_tokenizer(student(folder), folder)


def test_swapped_tokens_are_reported(plain: Path, tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    path = save(tokenizer, tmp_path / "swapped") / "tokenizer.json"
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    first, second = names[40], names[50]
    text = path.read_text()
    for old, new in ((f'"{first}": 40', f'"{first}": 50'), (f'"{second}": 50', f'"{second}": 40')):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    message = refused(plain, path.parent)
    assert f"token 40 is {first!r} for the student and {second!r} for the teacher" in message


def test_first_token_beyond_shorter_vocabulary_is_reported(plain: Path, tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["<new>"])
    larger = save(tokenizer, tmp_path / "larger")
    message = refused(larger, plain)
    assert f"token {size} is '<new>' for the student and None for the teacher" in message
    assert f"({size + 1} and {size} tokens)" in message
    assert f"token {size} is None for the student and '<new>'" in refused(plain, larger)


def test_first_token_of_other_vocabulary_is_reported(plain: Path, tmp_path: Path) -> None:
    other = save(byte_level_bpe(["quick brown foxes jump over"] * 20), tmp_path / "other")
    ours, theirs = (
        {i: t for t, i in Tokenizer.from_file(str(f / "tokenizer.json")).get_vocab().items()}
        for f in (plain, other)
    )
    first = next(i for i in range(len(ours)) if ours[i] != theirs.get(i))
    assert f"token {first} is {ours[first]!r} for the student" in refused(plain, other)


def test_equal_vocabulary_with_other_splitting_raises(plain: Path, tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(True)]
    )
    digits = save(tokenizer, tmp_path / "digits")
    assert "splits text differently" in refused(plain, digits)


def test_vocabulary_with_gap_is_compared_to_its_end(tmp_path: Path) -> None:
    """Some models leave a gap in their ids before the special tokens."""

    def with_gap(last: str) -> Path:
        words = {"<unk>": 0, "<end>": 1, "<begin>": 2, "the": 3, "end": 5, last: 6}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return save(tokenizer, tmp_path / last)

    ours, theirs = with_gap("ours"), with_gap("theirs")
    check_same_tokenizer(student(ours), ours)
    assert "token 6 is 'ours' for the student and 'theirs'" in refused(ours, theirs)


def test_teacher_without_tokenizer_raises(plain: Path, tmp_path: Path) -> None:
    bare = save_teacher(tmp_path / "bare")
    assert f"The tokenizer {bare} cannot be read" in refused(plain, bare)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {}}'])
def test_damaged_tokenizer_raises(plain: Path, tmp_path: Path, content: str) -> None:
    damaged = save(byte_level_bpe(), save_teacher(tmp_path / "damaged"))
    (damaged / "tokenizer.json").write_text(content)
    assert str(damaged) in refused(plain, damaged)


@pytest.mark.parametrize("class_name", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_model_file_that_transformers_reads_otherwise_raises(
    class_name: str, tmp_path: Path
) -> None:
    file = save_sentence_piece(tmp_path / "tokenizer.model", normalization_rule_name="identity",
                               remove_extra_whitespaces=False)  # fmt: skip
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    settings = {"tokenizer_class": class_name, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(LETError, match=str(file)):
        read_tokenizer(tmp_path)
    (tmp_path / "with_json").mkdir()
    write_tokenizer(file, tmp_path / "with_json")
    ids = SentencePieceProcessor(str(file)).encode("    return x")
    assert read_tokenizer(tmp_path / "with_json")("    return x").input_ids == ids


vocabularies = st.lists(st.text(max_size=4), max_size=8).map(lambda tokens: dict(enumerate(tokens)))


@given(vocabularies, vocabularies)
def test_vocabularies_pass_only_if_equal(ours: dict[int, str], theirs: dict[int, str]) -> None:
    if ours == theirs:
        check_same_vocabulary(ours, theirs)
        return
    first = next(i for i in range(9) if ours.get(i) != theirs.get(i))
    with pytest.raises(LETError) as error:
        check_same_vocabulary(ours, theirs)
    assert f": token {first} is {ours.get(first)!r} for" in str(error.value)
