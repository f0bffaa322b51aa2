"""The public calls of a user's own training script."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megatron_let import integration as let
from megatron_let.compat import PatchSet
from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError
from megatron_let.teacher.documents import Documents
from tests.helpers.runs import call_ranks


def test_enable_with_another_engine_names_the_flag_and_the_entry() -> None:
    args = let.add_arguments(argparse.ArgumentParser()).parse_args(["--engine", "deepspeed"])
    with pytest.raises(LETError, match=r"--engine deepspeed .* megatron_let\.pretrain"):
        let.enable(args)


def test_documents_of_a_script_are_checked_if_a_teacher_reads_them(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--reset-attention-mask", "--transformer-impl", "transformer_engine"]
    monkeypatch.setattr(let, "enable_on_engine", lambda args, config: PatchSet())
    let.enable(parser.parse_args(flags))
    with pytest.raises(LETError, match="--reset-attention-mask"):
        let.enable(parser.parse_args([*flags, "--let-method", "let", "--let-teacher", "/t"]))


@pytest.mark.parametrize(
    ("flags", "cross_tokenizer", "found"),
    [
        ([], False, None),
        (["--reset-position-ids"], False, Documents(9, True, False)),
        (["--reset-attention-mask"], False, Documents(9, False, True)),
        # The teacher's own tokenizer ends a document with another token.
        (["--reset-position-ids"], True, Documents(7, True, False)),
    ],
)
def test_documents_of_the_teachers_rows_follow_the_flags(
    flags: list[str],
    cross_tokenizer: bool,
    found: Documents | None,
    parser: argparse.ArgumentParser,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(let, "get_tokenizer", lambda: SimpleNamespace(eod=9))
    own = SimpleNamespace(eos_token_id=7)
    monkeypatch.setattr(let, "read_teacher_tokenizer", lambda folder: own)
    config = LETConfig("let", Path("/t"), cross_tokenizer=cross_tokenizer)
    folder = SimpleNamespace(vocab_size=10)
    assert let._documents(parser.parse_args(flags), config, folder) == found  # type: ignore[arg-type]


@pytest.mark.parametrize("flag", ["--reset-position-ids", "--reset-attention-mask"])
def test_document_end_outside_the_teachers_vocabulary_is_refused(
    flag: str, parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(let, "get_tokenizer", lambda: SimpleNamespace(eod=10))
    args, folder = parser.parse_args([flag]), SimpleNamespace(vocab_size=10)
    with pytest.raises(LETError, match=r"ends with token 10, .* has 10 ids"):
        let._documents(args, LETConfig("let", Path("/t")), folder)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["rkd", "salt"])
def test_method_on_logits_has_no_token_aligner(method: str) -> None:
    config = LETConfig(method=method, teacher=Path("/no/teacher"), cross_tokenizer=True)
    assert let.token_aligner(argparse.Namespace(load=None), config) is None


def compare_settings(same: bool) -> None:
    """Compare settings over the ranks; the objects are gathered only if they differ."""
    torch.distributed.init_process_group("gloo")
    precision = "bf16" if same or torch.distributed.get_rank() != 1 else "fp32"
    setup = mock.Mock()
    check = let._check_agreement_before({"--let-teacher-dtype": precision}, setup)
    gather = torch.distributed.all_gather_object
    with mock.patch.object(torch.distributed, "all_gather_object", side_effect=gather) as gathers:
        if same:
            check(1)
            setup.assert_called_once_with(1)
        else:
            with pytest.raises(LETError, match="--let-teacher-dtype: bf16 and fp32") as error:
                check(1)
            assert error.value.collective and not setup.called
    assert gathers.called != same


@pytest.mark.medium
@pytest.mark.parametrize("same", [True, False])
def test_ranks_of_different_teacher_precisions_raise_error_before_setup(same: bool) -> None:
    call_ranks(compare_settings, same, ranks=3)
