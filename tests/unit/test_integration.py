"""The public calls of a user's own training script."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_let import integration as let
from megatron_let.compat import PatchSet
from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError


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


@pytest.mark.parametrize("method", ["rkd", "salt"])
def test_method_on_logits_has_no_token_aligner(method: str) -> None:
    config = LETConfig(method=method, teacher=Path("/no/teacher"), cross_tokenizer=True)
    assert let.token_aligner(argparse.Namespace(load=None), config) is None


def test_ranks_of_different_teacher_precisions_raise_error_before_setup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gather(found: list[object], own: dict[str, str]) -> None:
        found[:] = [own, {name: "fp32" for name in own}]

    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    calls: list[int] = []
    let._check_agreement_before({"--let-teacher-dtype": "fp32"}, calls.append)(1)
    with pytest.raises(LETError, match="--let-teacher-dtype: bf16 and fp32"):
        let._check_agreement_before({"--let-teacher-dtype": "bf16"}, calls.append)(2)
    assert calls == [1]
