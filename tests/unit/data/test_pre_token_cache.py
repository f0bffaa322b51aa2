"""The pre-token cache gives the tokenizer's ids, for any text and each kind of pre-tokenizer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_let.data.pre_token_cache import PreTokenCache, split_pattern
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from megatron_let.files.environment_text import environment_text
from tests.helpers.text_data import real_texts

pytestmark = pytest.mark.medium

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE_TOKENIZERS = {
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
    for name, pre_tokenizer in PRE_TOKENIZERS.items():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizer
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=900, initial_alphabet=alphabet, special_tokens=["<|e|>"], show_progress=False
        )
        tokenizer.train_from_iterator(real_texts()[:50], trainer)
        if name == "pythia":
            tokenizer.normalizer = normalizers.NFC()
            tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])

        found[name] = tokenizer
    return found


@pytest.fixture(scope="module")
def long_texts() -> list[str]:
    return list(environment_text(400_000))


# Classes of characters that pre-tokenizers distinguish, and their edge cases.
SINGLE = (
    "abzAZ019 \t\n\r\x0b\x0c\x1c\x85'’\"_-.,;:!?<|>/\\\x00é\u0300\u0301ßſK\u00a0\u2003\u2028\u200b"
)
OTHERS = "\ufeff\u3000٣²Ⅷ½東한ʰªǅ\u0903\u20dd\U0001f600\u200d\U0001d7d9\U000e0001"
SIGNS = st.sampled_from(
    [*SINGLE, *OTHERS, "'s", "'LL", "'ve", "  ", "\r\n", "\n\n", "<|e|>", "abc"]
)
TEXTS = st.one_of(st.text(max_size=80), st.lists(SIGNS, max_size=60).map("".join))


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_any_text_gives_the_tokenizers_ids(name: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[name]
    cache = PreTokenCache(tokenizer)

    @settings(max_examples=400, deadline=None)
    @given(text=TEXTS)
    def check(text: str) -> None:
        ids = cache.encode(text)
        if ids is not None:
            assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids

    check()


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_most_real_text_goes_through_the_cache(
    name: str, tokenizers: dict[str, Tokenizer], long_texts: list[str]
) -> None:
    tokenizer = tokenizers[name]
    cache = PreTokenCache(tokenizer)
    found = [cache.encode(text) for text in long_texts]
    for text, ids in zip(long_texts, found, strict=True):
        if ids is not None:
            assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert sum(ids is not None for ids in found) > 0.9 * len(found)


def test_most_characters_split_as_by_the_tokenizer(tokenizers: dict[str, Tokenizer]) -> None:
    cache = PreTokenCache(tokenizers["smollm2"])
    characters = [chr(c) for c in range(0x3000) if not 0xD800 <= c < 0xE000]
    disagreed = [c for c in characters if cache.encode(c) is None]
    # Texts with these bypass the cache; many of them would make it useless.
    assert len(disagreed) < 100


def test_added_token_that_strips_spaces_bypasses_the_cache(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = Tokenizer.from_str(tokenizers["gpt2"].to_str())
    tokenizer.add_tokens([AddedToken("abc", lstrip=True)])
    cache = PreTokenCache(tokenizer)
    assert cache.encode("x abc") is None
    assert cache.encode("x ab") is not None


def test_full_cache_is_cleared_and_stays_correct(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_let.data.pre_token_cache._MAX_ENTRIES", 50)
    cache = PreTokenCache(tokenizers["gpt2"])
    for text in real_texts()[:15]:
        ids = cache.encode(text)
        assert ids is not None
        assert ids.tolist() == tokenizers["gpt2"].encode(text).ids


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_long_text_gives_the_tokenizers_ids(
    name: str, tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_let.data.pre_token_cache._LONG_TEXT", 10)
    cache = PreTokenCache(tokenizers[name])
    text = "    def f(x):  # 123\n\n<|e|> it's" * 20
    ids = cache.encode(text)
    assert ids is not None and ids.tolist() == tokenizers[name].encode(text).ids


def test_long_pre_token_is_not_cached(tokenizers: dict[str, Tokenizer]) -> None:
    cache = PreTokenCache(tokenizers["gpt2"])
    long = "x" * 1000
    ids = cache.encode(long)
    assert ids is not None and ids.tolist() == tokenizers["gpt2"].encode(long).ids
    assert long not in cache


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
def test_other_tokenizers_have_no_split_pattern(
    changes: dict[str, Any], tokenizers: dict[str, Tokenizer]
) -> None:
    description = json.loads(tokenizers["gpt2"].to_str())
    assert split_pattern(description) is not None
    assert split_pattern(description | changes) is None
