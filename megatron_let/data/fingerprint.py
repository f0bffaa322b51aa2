"""Tokenizer fingerprint of a data set, in a sidecar file, and the check that uses it."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_let.data.text_tokenizer import TextTokenizer
from megatron_let.errors import LETError
from megatron_let.files.atomic import write_json
from megatron_let.teacher.tokenizer import without_special_ends

# Spaces, case, digits, code, scripts and bytes: what two tokenizers with equal vocabularies may
# split differently. A change makes every existing data set fail the check.
_PROBE_TEXT = (
    "The quick brown fox jumped; it's 1234567890 o'clock (isn't it?).\n\n  Late to Early\tTraining"
    "\r\n    def f(x_1: int) -> str:\n        return f'{x_1 + 0x1F:>10,.2f}'  # naïve café\n"
    "Größe, año, Łódź, ελληνικά, русский, עברית, العربية, हिन्दी, ไทย, 東京タワー, 한국어, e\u0301, "
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467, \u00a0\u2003\ufeff, \u2212\u2264\u222b,"
    ' http://example.org/?a=b&c=%20d, $\\frac{a^{2}}{\\sqrt{b}}$, <tag attr="v">, ALLCAPS camelCase'
)


def fingerprint(tokenizer: TextTokenizer) -> dict[str, Any]:
    """Return the identity of a preprocessing tokenizer.

    Returns:
        `vocab_size`; `eod`; `vocabulary`, a hash of every id and its token; and `splitting`, a hash
        of the ids of a fixed text, without special tokens.
    """
    return {
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "vocabulary": _vocabulary_hash(tokenizer.vocabulary()),
        "splitting": _ids_hash(tokenizer.encode([_PROBE_TEXT])[0]),
    }


def sidecar_file(prefix: str | Path) -> Path:
    """Return the path of the sidecar file of an indexed data set."""
    return Path(f"{prefix}.tokenizer.json")


def write_sidecar_file(prefix: str | Path, tokenizer: TextTokenizer, name: str) -> None:
    """Write the fingerprint of a data set's tokenizer, and its readable `name`."""
    write_json(sidecar_file(prefix), {"tokenizer": name, **fingerprint(tokenizer)})


def check_data_tokenizer(args: argparse.Namespace, tokenizer: Any) -> None:
    """Check that the run's tokenizer made its data; data without a sidecar file passes.

    Raises:
        LETError: a data set was made with another tokenizer.
    """
    # Imported here because preprocessing needs this module without Megatron's training loop.
    from megatron.training.utils import get_blend_and_blend_per_split

    # The null tokenizer has nothing to compare; `check_token_ids` compares the ids.
    if args.mock_data or args.tokenizer_type == "NullTokenizer":
        return
    blend, per_split = get_blend_and_blend_per_split(args)
    prefixes = [p for b in (blend, *(per_split or ())) if b is not None for p in b[0]]
    made = {
        p: json.loads(sidecar_file(p).read_text()) for p in prefixes if sidecar_file(p).is_file()
    }
    if not made:
        return
    ours = _of_megatron(tokenizer)
    for prefix, values in made.items():
        _check_equal(
            prefix, values, *ours,
            "give --tokenizer-model that tokenizer, or build the data again with"
            " tools/preprocess_data.py",
        )  # fmt: skip


def check_same_fingerprint(prefix: str | Path, tokenizer: TextTokenizer) -> None:
    """Check that `tokenizer` made a data set; data without a sidecar file passes.

    Raises:
        LETError: another tokenizer made it.
    """
    if sidecar_file(prefix).is_file():
        ours = fingerprint(tokenizer)
        made = json.loads(sidecar_file(prefix).read_text())
        advice = "give data of the model's tokenizer"
        _check_equal(prefix, made, ours, [ours["splitting"]], advice)


def _check_equal(
    prefix: str | Path,
    made: dict[str, Any],
    tokenizer: dict[str, Any],
    splittings: Sequence[str],
    advice: str,
) -> None:
    if made["vocab_size"] != tokenizer["vocab_size"]:
        difference = f"{made['vocab_size']} tokens there, {tokenizer['vocab_size']} in this run"
    elif made["vocabulary"] != tokenizer["vocabulary"]:
        difference = f"another vocabulary, though both have {made['vocab_size']} tokens"
    elif made["eod"] != tokenizer["eod"]:
        difference = f"documents end with token {made['eod']} there, {tokenizer['eod']} in this run"
    elif made["splitting"] not in splittings:
        difference = "the same vocabulary, but text is split differently"
    else:
        return
    raise LETError(
        f"The data {prefix} was made with another tokenizer ({made['tokenizer']}): {difference};"
        f" {advice}."
    )


def _of_megatron(tokenizer: Any) -> tuple[dict[str, Any], list[str]]:
    """Return vocabulary and end of document of Megatron's tokenizer, and possible splittings."""
    ids = list(tokenizer.tokenize(_PROBE_TEXT))
    possible = [_ids_hash(part) for part in without_special_ends(ids)]
    values = {
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "vocabulary": _vocabulary_hash(tokenizer.inv_vocab),
    }
    return values, possible


def _vocabulary_hash(vocabulary: dict[int, str]) -> str:
    lines = (f"{index} {token!r}\n" for index, token in sorted(vocabulary.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _ids_hash(ids: Iterable[int]) -> str:
    return hashlib.sha256(" ".join(str(int(i)) for i in ids).encode()).hexdigest()
