"""Byte-level BPE, faster: each distinct word is encoded once.

A byte-level BPE cuts text into words by a regular expression and encodes each word by itself, so
the ids of a text are those of its words. The tokenizer's own model gives the ids of a word. Its
cutting is done again here; a character takes part only after both cuttings agreed on it, and a
text with another character, or in a form that the normalizer would change, goes through the
tokenizer itself.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import regex

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits are cut out first, so that text before one ends there.
_GPT2_DIGITS = _CONTRACTIONS + r"| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_MAX_WORDS = 300_000
_MAX_WORD_LENGTH = 40
# Characters; a list of the words of a longer text would take more memory than the text.
_LONG_TEXT = 1_000_000


class WordCache(dict[str, list[int]]):
    """Ids of words, and of texts made of them.

    Args:
        tokenizer: a `tokenizers.Tokenizer` for which `cutting_pattern` is not None.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        description = json.loads(tokenizer.to_str())
        pattern = cutting_pattern(description)
        assert pattern is not None
        self._words = regex.compile(pattern)
        self._tokenizer = tokenizer
        self._model = tokenizer.model
        self._nfc = description["normalizer"] is not None
        self._added = {token["content"]: token["id"] for token in description["added_tokens"]}
        self._added_passes = _added_patterns(description["added_tokens"])
        self._letters = byte_letters()
        self._agreed: set[str] = set()
        self._refused: set[str] = set()

    def encode(self, text: str) -> npt.NDArray[np.int32] | None:
        """Ids of a text, or None where the tokenizer itself must be asked."""
        if self._nfc and not unicodedata.is_normalized("NFC", text):
            return None
        characters = set(text)
        if not characters <= self._agreed and not self._agree(characters):
            return None
        return self._encode_parts(text)

    def _encode_parts(self, text: str) -> npt.NDArray[np.int32] | None:
        """Ids of a text without regard to its characters."""
        if not any(token in text for token in self._added):
            return self._encode_words(text)
        if self._added_passes is None:
            return None
        # The tokenizer too cuts added tokens out first, and takes the rest piece by piece.
        parts: list[tuple[str, bool]] = [(text, False)]
        for added in self._added_passes:
            parts = [
                (piece, known or bool(odd % 2))
                for part, known in parts
                for odd, piece in enumerate([part] if known else added.split(part))
            ]
        return np.concatenate(
            [
                np.array([self._added[part]], dtype=np.int32) if known else self._encode_words(part)
                for part, known in parts
            ]
        )

    def _encode_words(self, text: str) -> npt.NDArray[np.int32]:
        if len(self) > _MAX_WORDS:
            self.clear()
        words: Iterable[str] = (
            self._words.findall(text)
            if len(text) <= _LONG_TEXT
            else (match.group() for match in self._words.finditer(text))
        )
        return np.fromiter(chain.from_iterable(map(self.__getitem__, words)), dtype=np.int32)

    def __missing__(self, word: str) -> list[int]:
        letters = word.encode().decode("latin-1").translate(self._letters)
        ids = [token.id for token in self._model.tokenize(letters)]
        if len(word) <= _MAX_WORD_LENGTH:
            self[word] = ids
        return ids

    def _agree(self, characters: set[str]) -> bool:
        """Whether both cuttings agree on these characters; asks about new ones."""
        for character in characters - self._agreed - self._refused:
            agreed = self._cut_alike(_around(character))
            (self._agreed if agreed else self._refused).add(character)
        return not characters & self._refused

    def _cut_alike(self, text: str) -> bool:
        theirs = self._tokenizer.encode(text, add_special_tokens=False).ids
        ours = self._encode_parts(text)
        return ours is not None and ours.tolist() == theirs


def cutting_pattern(description: dict[str, Any]) -> str | None:
    """Regular expression that cuts text into words.

    Args:
        description: a tokenizer's JSON, parsed.

    Returns:
        The pattern, or None for a tokenizer that is no plain byte-level BPE.
    """
    model, normalizer = description["model"], description["normalizer"]
    plain = model["type"] == "BPE" and not model.get("dropout") and not model.get("byte_fallback")
    if not plain or normalizer not in (None, {"type": "NFC"}):
        return None
    step = description["pre_tokenizer"] or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    last, before = steps[-1], steps[:-1]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        if not before:
            return _GPT2
        digits = {"type": "Digits", "individual_digits": True}
        return _GPT2_DIGITS if before == [digits] else None
    return _isolated_pattern(before)


def _isolated_pattern(steps: list[dict[str, Any]]) -> str | None:
    """The pattern of a single step that keeps each match as a word, as Llama 3 has it."""
    if len(steps) != 1 or steps[0].get("type") != "Split":
        return None
    step = steps[0]
    if step["behavior"] != "Isolated" or step["invert"] or "Regex" not in step["pattern"]:
        return None
    # Every character must fall into some word, as a last resort into one of its own.
    return f"{step['pattern']['Regex']}|[\\s\\S]"


def _added_patterns(tokens: list[dict[str, Any]]) -> list[regex.Pattern[str]] | None:
    """Patterns of the added tokens, the longest first; None if some take more than their text.

    Tokens that are looked for before normalizing are a pass of their own, before the others.
    """
    if any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in tokens):
        return None
    patterns = []
    for normalized in (False, True):
        contents = [t["content"] for t in tokens if t["normalized"] == normalized]
        if contents:
            longest_first = sorted(contents, key=len, reverse=True)
            patterns.append(regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")"))
    return patterns


def byte_letters() -> dict[int, str]:
    """The letter that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _around(c: str) -> str:
    """A character beside letters, digits, signs, spaces and itself."""
    return (
        f"{c}a{c}b {c} 1{c}2 {c}{c} .{c}, {c}. \n{c}\n\n{c}  {c}   x{c}  \t{c}\t'{c} '{c}{c}e"
        f" it'{c}{c}12345{c}  {c}{c}{c}{c} A{c}\r\n{c}\r {c}1 {c}a {c}!{c}"
    )
