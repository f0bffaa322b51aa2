"""Pre-token cache: byte-level BPE that encodes each distinct pre-token once.

A byte-level BPE splits text into pre-tokens by a regular expression and encodes each separately.
The cache splits the text itself and takes a pre-token's ids from the tokenizer's model. It handles
a character only after its split and the tokenizer's agreed on it; a text with any other character,
or one that the normalizer would change, goes through the tokenizer.
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
# Digits are split off first, so that text before a digit ends there.
_GPT2_DIGITS = _CONTRACTIONS + r"| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_MAX_ENTRIES = 300_000
_MAX_ENTRY_LENGTH = 40
# Characters; a list of the pre-tokens of a longer text would take more memory than the text.
_LONG_TEXT = 1_000_000


class PreTokenCache(dict[str, list[int]]):
    """Ids by pre-token; encodes texts.

    Args:
        tokenizer: a `tokenizers.Tokenizer` for which `split_pattern` is not None.
    """

    def __init__(self, tokenizer: Any) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        super().__init__()
        description = json.loads(tokenizer.to_str())
        pattern = split_pattern(description)
        assert pattern is not None
        self._pattern = regex.compile(pattern)
        self._tokenizer = tokenizer
        self._model = tokenizer.model
        self._nfc = description["normalizer"] is not None
        self._added = {token["content"]: token["id"] for token in description["added_tokens"]}
        self._added_passes = _added_patterns(description["added_tokens"])
        self._byte_characters = bytes_to_unicode()
        self._agreed: set[str] = set()
        self._refused: set[str] = set()

    def encode(self, text: str) -> npt.NDArray[np.int32] | None:
        """Return the ids of a text, or None if only the tokenizer can encode it."""
        if self._nfc and not unicodedata.is_normalized("NFC", text):
            return None
        characters = set(text)
        if not characters <= self._agreed and not self._agree(characters):
            return None
        return self._encode_parts(text)

    def _encode_parts(self, text: str) -> npt.NDArray[np.int32] | None:
        """Encode a text without checking its characters."""
        if not any(token in text for token in self._added):
            return self._encode_plain(text)
        if self._added_passes is None:
            return None
        # Like the tokenizer: split at the added tokens first, then encode the rest in pieces.
        parts: list[tuple[str, bool]] = [(text, False)]
        for added in self._added_passes:
            parts = [
                (piece, known or bool(odd % 2))
                for part, known in parts
                for odd, piece in enumerate([part] if known else added.split(part))
            ]
        return np.concatenate(
            [
                np.array([self._added[part]], dtype=np.int32) if known else self._encode_plain(part)
                for part, known in parts
            ]
        )

    def _encode_plain(self, text: str) -> npt.NDArray[np.int32]:
        """Encode a text without added tokens."""
        if len(self) > _MAX_ENTRIES:
            self.clear()
        pre_tokens: Iterable[str] = (
            self._pattern.findall(text)
            if len(text) <= _LONG_TEXT
            else (match.group() for match in self._pattern.finditer(text))
        )
        return np.fromiter(chain.from_iterable(map(self.__getitem__, pre_tokens)), dtype=np.int32)

    def __missing__(self, pre_token: str) -> list[int]:
        characters = pre_token.encode().decode("latin-1").translate(self._byte_characters)
        ids = [token.id for token in self._model.tokenize(characters)]
        if len(pre_token) <= _MAX_ENTRY_LENGTH:
            self[pre_token] = ids
        return ids

    def _agree(self, characters: set[str]) -> bool:
        """Return whether both splits agree on these characters; test new ones."""
        for character in characters - self._agreed - self._refused:
            agreed = self._encodes_alike(_contexts(character))
            (self._agreed if agreed else self._refused).add(character)
        return not characters & self._refused

    def _encodes_alike(self, text: str) -> bool:
        theirs = self._tokenizer.encode(text, add_special_tokens=False).ids
        ours = self._encode_parts(text)
        return ours is not None and ours.tolist() == theirs


def split_pattern(description: dict[str, Any]) -> str | None:
    """Return the regular expression that splits text into pre-tokens.

    Args:
        description: a tokenizer's JSON, parsed.

    Returns:
        The pattern, or None for a tokenizer that is not a plain byte-level BPE.
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
    """Return the pattern of a single step that isolates each match, as Llama 3 has it."""
    if len(steps) != 1 or steps[0].get("type") != "Split":
        return None
    step = steps[0]
    if step["behavior"] != "Isolated" or step["invert"] or "Regex" not in step["pattern"]:
        return None
    # Every character must belong to a pre-token; the last alternative makes it one by itself.
    return f"{step['pattern']['Regex']}|[\\s\\S]"


def _added_patterns(tokens: list[dict[str, Any]]) -> list[regex.Pattern[str]] | None:
    """Return patterns of the added tokens, longest first; None if a token strips text around it.

    Tokens that are matched before normalization form the first pass.
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


def _contexts(c: str) -> str:
    """Return a text with a character next to letters, digits, punctuation, spaces and itself."""
    return (
        f"{c}a{c}b {c} 1{c}2 {c}{c} .{c}, {c}. \n{c}\n\n{c}  {c}   x{c}  \t{c}\t'{c} '{c}{c}e"
        f" it'{c}{c}12345{c}  {c}{c}{c}{c} A{c}\r\n{c}\r {c}1 {c}a {c}!{c}"
    )
