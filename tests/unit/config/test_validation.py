"""Flags of Megatron that LET or the entry does not support."""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest

from megatron_let.config.validation import (
    NOT_IN_THE_ENTRY,
    REFUSED,
    REFUSED_WITH_LOGITS,
    REFUSED_WITH_PROJECTION,
    check_entry_supports,
    check_supported,
)
from megatron_let.errors import LETError

Row = tuple[str, Any, str]


def assert_sentence_of_flags(message: str, parser: argparse.ArgumentParser) -> None:
    assert "\n" not in message and message.endswith("."), message
    for flag in re.findall(r"--[a-z][\w-]+", message):
        assert flag in parser._option_string_actions, f"Megatron has no {flag}"


@pytest.mark.parametrize("method", ["let", "rkd", "salt"])
def test_megatrons_defaults_are_supported(method: str, parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args(["--let-method", method, "--let-projection", "learned"])
    check_supported(args)
    check_entry_supports(args)


@pytest.mark.parametrize(
    ("row", "given"),
    [
        *((row, {"let_method": "let"}) for row in REFUSED),
        *((row, {"let_method": "salt"}) for row in REFUSED_WITH_LOGITS),
        *(
            (row, {"let_method": "let", "let_projection": "learned"})
            for row in REFUSED_WITH_PROJECTION
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_unsupported_value_raises_error_naming_flags_that_exist(
    row: Row, given: dict[str, str], parser: argparse.ArgumentParser
) -> None:
    name, allowed, reason = row
    value = "other" if isinstance(allowed, str) else 2
    with pytest.raises(LETError, match=re.escape(reason)) as error:
        check_supported(argparse.Namespace(**given, **{name: value}))
    assert f" {value}: " in str(error.value)
    assert_sentence_of_flags(str(error.value), parser)
    check_supported(argparse.Namespace(**given, **{name: allowed}))
    check_supported(argparse.Namespace(let_method="none", **{name: value}))


@pytest.mark.parametrize("name", [row[0] for row in REFUSED_WITH_PROJECTION])
def test_flag_refused_with_a_learned_projection_is_supported_without(name: str) -> None:
    args = {"let_method": "let", "let_projection": "interpolate", name: "other"}
    check_supported(argparse.Namespace(**args))


@pytest.mark.parametrize("name", NOT_IN_THE_ENTRY)
def test_flag_that_the_entry_ignores_raises_error_naming_it(
    name: str, parser: argparse.ArgumentParser
) -> None:
    with pytest.raises(LETError, match="--" + name.replace("_", "-")) as error:
        check_entry_supports(argparse.Namespace(**{name: True}))
    assert_sentence_of_flags(str(error.value), parser)
