"""Flags of Megatron that LET does not support."""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest

from megatron_let.config.validation import (
    REFUSED,
    REFUSED_WITH_FSDP,
    REFUSED_WITH_HYBRID,
    REFUSED_WITH_LOGITS,
    REFUSED_WITH_PROJECTION,
    Table,
    check_document_mask,
    check_hybrid,
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


def hybrid_args(parser: argparse.ArgumentParser, *flags: str) -> argparse.Namespace:
    """Return arguments of a HybridModel on a host without Transformer Engine."""
    given = ("--hybrid-layer-pattern", "*-*-", "--transformer-impl", "local")
    return parser.parse_args([*given, *flags])


@pytest.mark.parametrize("name", REFUSED_WITH_HYBRID)
def test_argument_that_a_hybrid_model_ignores_is_refused(
    name: str, parser: argparse.ArgumentParser
) -> None:
    args = hybrid_args(parser)
    # The neutral value is Megatron's default.
    check_hybrid(args)
    _, reason = REFUSED_WITH_HYBRID[name]
    setattr(args, name, 2)
    with pytest.raises(LETError, match=re.escape(reason)) as error:
        check_hybrid(args)
    assert_sentence_of_flags(str(error.value), parser)
    args.hybrid_layer_pattern = None
    check_hybrid(args)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--hybrid-layer-pattern", ""], "has no entry"),
        (["--hybrid-layer-pattern", "*-/*-"], "/ on"),
        (["--hybrid-layer-pattern", "M-*-"], "M entries, which need .* mamba-ssm"),
        (["--hybrid-layer-pattern", "G-"], "G entries, which need .* Transformer Engine"),
        (["--hybrid-layer-pattern", "D-"], "D entries, which need .* Transformer Engine"),
        (["--hybrid-layer-pattern", "+-"], r"\+ entries, which need .* Transformer Engine"),
        (["--hybrid-layer-pattern", "*E"], "--num-experts None"),
        (["--num-experts", "4"], "--num-experts 4"),
        (["--multi-latent-attention"], "--multi-latent-attention"),
        (["--position-embedding-type", "relative"], "--position-embedding-type relative"),
        (["--attention-backend", "local"], "--attention-backend local"),
    ],
    ids=" ".join,
)
def test_hybrid_model_that_cannot_be_built_is_refused(
    flags: list[str], named: str, parser: argparse.ArgumentParser
) -> None:
    with pytest.raises(LETError, match=named) as error:
        check_hybrid(hybrid_args(parser, *flags))
    assert_sentence_of_flags(str(error.value), parser)


def test_entries_of_megatrons_own_layers_need_its_packages(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = hybrid_args(parser, "--transformer-impl", "transformer_engine")
    for args.hybrid_layer_pattern in ("G-*-", "*-*-"):
        check_hybrid(args)
    args.hybrid_layer_pattern = "M-*-"
    for installed in (None, object()):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=installed: found)
        if installed:
            check_hybrid(args)
        else:
            with pytest.raises(LETError, match="mamba-ssm"):
                check_hybrid(args)
