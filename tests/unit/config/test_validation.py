"""Flags of Megatron that LET does not support."""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest

from megatron_let.config.validation import (
    REFUSED,
    REFUSED_WITH_LOGITS,
    REFUSED_WITH_PROJECTION,
    Table,
    check_document_mask,
    check_script_masks_documents,
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


DOCUMENTS = ["--reset-attention-mask", "--transformer-impl", "local", "--no-masked-softmax-fusion"]


@pytest.mark.parametrize(
    ("flags", "values", "named"),
    [
        (["--transformer-impl", "transformer_engine"], {}, "--transformer-impl local"),
        (["--pipeline-model-parallel-size", "3"], {}, "middle stages"),
        (
            ["--pipeline-model-parallel-size", "2"],
            {"virtual_pipeline_model_parallel_size": 2},
            "middle stages",
        ),
        (["--no-create-attention-mask-in-dataloader"], {}, "--no-create-attention-mask-in-dat"),
        ([], {"masked_softmax_fusion": True}, "--no-masked-softmax-fusion"),
    ],
)
def test_script_whose_student_would_attend_across_documents_is_refused(
    flags: list[str], values: dict[str, Any], named: str, parser: argparse.ArgumentParser
) -> None:
    args = parser.parse_args([*DOCUMENTS, *flags])
    args.virtual_pipeline_model_parallel_size = None  # derived by Megatron's validation
    vars(args).update(values)
    with pytest.raises(LETError, match=named) as error:
        check_script_masks_documents(args)
    assert_sentence_of_flags(str(error.value), parser)
    args.reset_attention_mask = False
    check_script_masks_documents(args)


def test_script_with_masks_on_all_stages_is_supported(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args([*DOCUMENTS, "--pipeline-model-parallel-size", "2"])
    args.virtual_pipeline_model_parallel_size = None
    check_script_masks_documents(args)
    check_document_mask(args)
