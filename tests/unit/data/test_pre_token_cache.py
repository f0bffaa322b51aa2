"""The word cache gives the tokenizer's own ids, on any text and for each way to cut words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from megatron_let.data.environment_text import environment_text
from megatron_let.data.pre_token_cache import WordCache, cutting_pattern
from tests.helpers.text_data import real_texts

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTTINGS = {
    "gpt2": BYTE_LEVEL,
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
    "llama3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "pythia": BYTE_LEVEL,
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    found = {}
    for name, cutting in CUTTINGS.items():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = cutting
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=900, initial_alphabet=alphabet, special_tokens=["<|e|>"], show_progress=False
        )
        tokenizer.train_from_iterator(real_texts(100_000), trainer)
        if name == "pythia":
            tokenizer.normalizer = normalizers.NFC()
            tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])

        found[name] = tokenizer
    return found


# Classes of characters that cuttings tell apart, and the likely traps among them.
SINGLE = (
    "abzAZ019 \t\n\r\x0b\x0c\x1c\x85'’\"_-.,;:!?<|>/\\\x00é\u0300\u0301ßſK\u00a0\u2003\u2028\u200b"
)
OTHERS = "\ufeff\u3000٣²Ⅷ½東한ʰªǅ\u0903\u20dd\U0001f600\u200d\U0001d7d9\U000e0001"
SIGNS = st.sampled_from(
    [*SINGLE, *OTHERS, "'s", "'LL", "'ve", "  ", "\r\n", "\n\n", "<|e|>", "abc"]
)
TEXTS = st.one_of(st.text(max_size=80), st.lists(SIGNS, max_size=60).map("".join))


@pytest.mark.parametrize("name", CUTTINGS)
def test_any_text(name: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[name]
    cache = WordCache(tokenizer)

    @settings(max_examples=400, deadline=None)
    @given(text=TEXTS)
    def check(text: str) -> None:
        ids = cache.encode(text)
        if ids is not None:
            assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids

    check()


@pytest.mark.parametrize("name", CUTTINGS)
def test_real_text_goes_through_the_cache(name: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[name]
    cache = WordCache(tokenizer)
    texts = list(environment_text(400_000))
    found = [cache.encode(text) for text in texts]
    for text, ids in zip(texts, found, strict=True):
        if ids is not None:
            assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert sum(ids is not None for ids in found) > 0.9 * len(found)


def test_every_assigned_character(tokenizers: dict[str, Tokenizer]) -> None:
    cache = WordCache(tokenizers["smollm2"])
    characters = [chr(c) for c in range(0x3000) if not 0xD800 <= c < 0xE000]
    disagreed = [c for c in characters if cache.encode(c) is None]
    # Not a failure of the cache, which refuses them, but more would make it useless.
    assert len(disagreed) < 100


def test_an_added_token_that_takes_spaces_along_is_left_alone(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = Tokenizer.from_str(tokenizers["gpt2"].to_str())
    tokenizer.add_tokens([AddedToken("abc", lstrip=True)])
    cache = WordCache(tokenizer)
    assert cache.encode("x abc") is None
    assert cache.encode("x ab") is not None


def test_forgets_when_full(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_let.data.pre_token_cache._MAX_WORDS", 50)
    cache = WordCache(tokenizers["gpt2"])
    for text in real_texts(20_000):
        ids = cache.encode(text)
        assert ids is not None
        assert ids.tolist() == tokenizers["gpt2"].encode(text).ids


@pytest.mark.parametrize("name", CUTTINGS)
def test_long_text(
    name: str, tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_let.data.pre_token_cache._LONG_TEXT", 10)
    cache = WordCache(tokenizers[name])
    text = "    def f(x):  # 123\n\n<|e|> it's" * 20
    ids = cache.encode(text)
    assert ids is not None and ids.tolist() == tokenizers[name].encode(text).ids


def test_a_long_word_is_not_kept(tokenizers: dict[str, Tokenizer]) -> None:
    cache = WordCache(tokenizers["gpt2"])
    word = "x" * 1000
    ids = cache.encode(word)
    assert ids is not None and ids.tolist() == tokenizers["gpt2"].encode(word).ids
    assert word not in cache


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"model": {"type": "Unigram"}},
        {"model": {"type": "BPE", "dropout": 0.1}},
        {"model": {"type": "BPE", "byte_fallback": True}},
    ],
)
def test_other_tokenizers_are_left_alone(
    changes: dict[str, Any], tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    description = json.loads(tokenizers["gpt2"].to_str())
    assert cutting_pattern(description) is not None
    assert cutting_pattern(description | changes) is None
