"""Flags of Megatron that LET does not support."""

from __future__ import annotations

import argparse
import re

import pytest

from megatron_let.config.validation import (
    REFUSED,
    REFUSED_WITH_FSDP,
    REFUSED_WITH_LOGITS,
    REFUSED_WITH_PROJECTION,
    Table,
    check_supported,
)
from megatron_let.errors import LETError


def assert_sentence_of_flags(message: str, parser: argparse.ArgumentParser) -> None:
    assert "\n" not in message and message.endswith("."), message
    for flag in re.findall(r"--[a-z][\w-]+", message):
        assert flag in parser._option_string_actions, f"Megatron has no {flag}"


@pytest.mark.parametrize("method", ["let", "rkd", "salt"])
def test_megatrons_defaults_are_supported(method: str, parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args(["--let-method", method, "--let-projection", "learned"])
    check_supported(args)


@pytest.mark.parametrize(
    ("table", "name", "given"),
    [
        *((REFUSED, name, {"let_method": "let"}) for name in REFUSED),
        *((REFUSED_WITH_LOGITS, name, {"let_method": "salt"}) for name in REFUSED_WITH_LOGITS),
        *(
            (REFUSED_WITH_PROJECTION, name, {"let_method": "let", "let_projection": "learned"})
            for name in REFUSED_WITH_PROJECTION
        ),
        *(
            (REFUSED_WITH_FSDP, name, {"let_method": "let", sharding: True})
            for name in REFUSED_WITH_FSDP
            for sharding in ("use_torch_fsdp2", "use_megatron_fsdp")
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_value_raises_error_naming_flags_that_exist(
    table: Table, name: str, given: dict[str, str], parser: argparse.ArgumentParser
) -> None:
    supported, reason = table[name]
    value = "other" if isinstance(supported, str) else 2
    with pytest.raises(LETError, match=re.escape(reason)) as error:
        check_supported(argparse.Namespace(**given, **{name: value}))
    assert f" {value}: " in str(error.value)
    assert_sentence_of_flags(str(error.value), parser)
    check_supported(argparse.Namespace(**given, **{name: supported}))
    check_supported(argparse.Namespace(let_method="none", **{name: value}))


@pytest.mark.parametrize("name", REFUSED_WITH_PROJECTION)
def test_flag_refused_with_a_learned_projection_is_supported_without(name: str) -> None:
    args = {"let_method": "let", "let_projection": "interpolate", name: "other"}
    check_supported(argparse.Namespace(**args))
