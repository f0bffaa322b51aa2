"""The `--let-*` flags become a LETConfig."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest

from megatron_let.config.arguments import add_arguments, let_config_from_args, num_steps
from megatron_let.config.let_config import LETConfig

LET = ("--let-method", "let", "--let-teacher", "/t")


def parse(*flags: str) -> argparse.Namespace:
    return add_arguments(argparse.ArgumentParser()).parse_args(flags)


def test_every_setting_has_a_flag() -> None:
    flags = [
        *LET, "--let-layer", "5", "--let-weight", "0.5", "--let-stop-step", "7",
        "--let-teacher-layer", "middle", "--no-let-teacher-final-norm",
        "--let-teacher-dtype", "fp32", "--let-loss", "logsum", "--let-kd-weight", "0.3",
        "--let-kd-temperature", "2", "--let-kd-top-k", "8",
        "--let-teacher-compile", "--let-placement", "spread", "--let-max-prefetch", "4",
        "--let-projection", "learned",
    ]  # fmt: skip
    values: dict[str, Any] = {
        "loss": "logsum", "kd_weight": 0.3, "kd_temperature": 2.0, "kd_top_k": 8,
        "teacher_compile": True, "placement": "spread", "max_prefetch": 4,
        "projection": "learned",
    }  # fmt: skip
    expected = LETConfig("let", Path("/t"), 5, 0.5, 7, "middle", False, "fp32", **values)
    with pytest.warns(UserWarning, match="--let-kd-temperature.*--let-method let"):
        assert let_config_from_args(parse(*flags)) == expected
    default = LETConfig()
    unset = [n for n, v in dataclasses.asdict(expected).items() if v == getattr(default, n)]
    # It is valid with the cosine only.
    assert unset == ["cross_tokenizer"], "all others differ from the default"
    assert let_config_from_args(parse(*LET, "--let-cross-tokenizer")).cross_tokenizer


def test_no_flags_give_method_none_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert let_config_from_args(parse()) == LETConfig()
        assert let_config_from_args(parse("--let-metrics-path", "m")) == LETConfig()


@pytest.mark.parametrize(
    ("method", "flags", "expected"),
    [
        ("none", ["--let-layer=2", "--let-stop-step=5"], "--let-layer, --let-stop-step"),
        # A default that is given explicitly.
        ("none", ["--let-teacher-final-norm"], "--let-teacher-final-norm"),
        ("let", ["--let-kd-weight=0.1"], "--let-kd-weight"),
        ("rkd", ["--let-layer=2"], "--let-layer"),
        ("rkd", ["--let-stop-step=5"], "--let-stop-step"),
        ("salt", ["--let-loss=cca", "--let-stop-step=5"], "--let-loss"),
    ],
)
def test_unused_flags_warn_with_their_names(method: str, flags: list[str], expected: str) -> None:
    teacher = ["--let-teacher", "/t"] if method != "none" else []
    args = parse("--let-method", method, *teacher, *flags)
    with pytest.warns(UserWarning, match=f"^{expected} .*--let-method {method}"):
        assert let_config_from_args(args).method == method


def test_every_setting_is_read_by_some_method() -> None:
    flags = {f"let_{name}": None for name in LETConfig.__dataclass_fields__}
    for name in LETConfig.__dataclass_fields__.keys() - {"method", "teacher"}:
        default = getattr(LETConfig(), name)
        given = {"let_teacher": Path("/t"), f"let_{name}": 2 if default is None else default}
        unused = []
        for method in ("let", "rkd", "salt"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                let_config_from_args(argparse.Namespace(**flags | given | {"let_method": method}))
            unused.append(bool(caught))
        assert not all(unused), name


@pytest.mark.parametrize(
    ("flags", "student", "teacher"),
    [
        (("--let-layer", "middle", "--let-teacher-layer", "5"), 12, "5"),
        (("--let-layer", "last"), 24, "last"),
    ],
)
def test_layer_names_resolve_to_layer_numbers(
    flags: tuple[str, ...], student: int, teacher: str
) -> None:
    args = parse(*LET, *flags)
    args.num_layers = 24
    config = let_config_from_args(args)
    assert (config.layer, config.teacher_layer) == (student, teacher)


def test_middle_of_one_layer_is_that_layer() -> None:
    args = parse(*LET, "--let-layer", "middle")
    args.num_layers = 1
    assert let_config_from_args(args).layer == 1


@pytest.mark.parametrize("flag", ["--let-method=kd", "--let-layer=x", "--let-teacher-dtype=fp64"])
def test_value_of_wrong_type_is_refused_by_the_parser(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(flag)
    assert flag.split("=")[0] in capsys.readouterr().err


def test_num_steps_equal_for_iterations_and_samples() -> None:
    assert num_steps(argparse.Namespace(train_iters=100)) == 100
    samples = argparse.Namespace(train_iters=None, train_samples=100 * 8, global_batch_size=8)
    assert num_steps(samples) == 100
