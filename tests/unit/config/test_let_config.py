"""What the flags may say: LETConfig, the `--let-*` flags, and the checks before training."""

from __future__ import annotations

import argparse
import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from megatron_let.config import validation
from megatron_let.config.arguments import (
    add_arguments,
    let_config_from_args,
    loaded_checkpoint,
    resumed_step,
)
from megatron_let.config.let_config import LETConfig
from megatron_let.config.validation import check_entry_supports, check_supported
from megatron_let.errors import LETError
from megatron_let.teacher.inspect import TeacherFolder
from megatron_let.teacher.validation import check_fits, check_vocabulary_size

TEACHER = Path("/models/small")
FOLDER = TeacherFolder(TEACHER, num_layers=12, hidden_size=64, vocab_size=100, max_positions=2048)


LET = ("--let-method", "let", "--let-teacher", "/t")
PAIR = ("--let-layer-pair", "M2M")


def let_config(**values: Any) -> LETConfig:
    return LETConfig(**{"method": "let", "teacher": TEACHER, **values})


def megatron_args(**values: Any) -> argparse.Namespace:
    common: dict[str, Any] = {
        "num_layers": 24,
        "micro_batch_size": 16,
        "seq_length": 1280,
        "train_iters": 7629,
        "train_samples": None,
        "global_batch_size": 2048,
        "load": None,
        "finetune": False,
        "ckpt_step": None,
    }
    return argparse.Namespace(**common | values)


def parse(*flags: str) -> argparse.Namespace:
    return add_arguments(argparse.ArgumentParser()).parse_args(flags)


def assert_one_sentence(message: str) -> None:
    assert "\n" not in message and message.endswith("."), message


# LETConfig


def test_defaults_are_the_papers() -> None:
    config = LETConfig()
    assert (config.layer, config.weight, config.stop_step) == (3, 0.1, 1500)
    assert (config.teacher_layer, config.teacher_final_norm) == ("last", True)
    assert config.method == "none" and not config.enabled


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"method": "kd"}, "--let-method is 'kd'; choose one of none, let, rkd, salt"),
        ({"loss": "mse"}, "--let-loss is 'mse'; choose one of cosine, logsum, cca"),
        ({"loss": "cca", "projection": "learned"}, "has nothing to learn from --let-loss cca"),
        ({"projection": "mlp"}, "--let-projection is 'mlp'; choose one of interpolate, learned"),
        (
            {"method": "salt", "projection": "learned"},
            "--let-projection learned is for hidden states and --let-method salt learns from",
        ),
        ({"method": "rkd", "teacher": None}, "--let-method rkd needs --let-teacher"),
        ({"method": "rkd", "kd_weight": 1.5}, "--let-kd-weight is 1.5; give the teacher's share"),
        ({"method": "salt", "kd_weight": float("nan")}, "--let-kd-weight is nan"),
        ({"method": "rkd", "kd_temperature": 0.0}, "--let-kd-temperature is 0.0"),
        ({"method": "salt", "kd_top_k": -1}, "--let-kd-top-k is -1"),
        ({"method": "salt", "stop_step": 0}, "--let-stop-step is 0"),
        ({"method": "rkd", "kd_fade": True}, "--let-kd-fade is for --let-method salt"),
        ({"teacher": None}, "--let-method let needs --let-teacher"),
        ({"layer": 0}, "--let-layer is 0; layers are counted from 1"),
        ({"layer": -2}, "--let-layer is -2"),
        ({"weight": -0.1}, "--let-weight is -0.1; give a finite weight of at least 0"),
        ({"weight": float("nan")}, "--let-weight is nan"),
        ({"weight": float("inf")}, "--let-weight is inf"),
        ({"stop_step": 0}, "--let-stop-step is 0; give the step, at least 1"),
        ({"stop_step": -5}, "--let-stop-step is -5"),
        ({"teacher_layer": "0"}, "--let-teacher-layer is '0'; give last, middle or a number"),
        ({"teacher_layer": "-1"}, "--let-teacher-layer is '-1'"),
        ({"teacher_layer": "first"}, "--let-teacher-layer is 'first'"),
        ({"teacher_layer": "2.5"}, "--let-teacher-layer is '2.5'"),
        ({"teacher_layer": ""}, "--let-teacher-layer is ''"),
    ],
)
def test_value_out_of_range_is_named_in_one_sentence(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(LETError) as error:
        let_config(**values)
    assert expected in str(error.value)
    assert_one_sentence(str(error.value))


@pytest.mark.parametrize("tap", ["last", "middle", "1", "12"])
def test_teacher_layers_that_are_accepted(tap: str) -> None:
    assert let_config(teacher_layer=tap).teacher_layer == tap


def test_weight_0_is_accepted_and_is_off() -> None:
    assert let_config().enabled
    assert let_config(method="rkd", weight=0.0).enabled
    assert not let_config(method="salt", kd_weight=0.0).enabled
    assert not let_config(weight=0.0).enabled


def test_config_cannot_change_after_its_checks() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        let_config().weight = -1.0  # type: ignore[misc]


# Flags


def test_every_setting_has_a_flag_and_the_flag_reaches_it() -> None:
    flags = [
        "--let-method", "let", "--let-teacher", "/t", "--let-layer", "5", "--let-weight", "0.5",
        "--let-stop-step", "7", "--let-teacher-layer", "middle", "--no-let-teacher-final-norm",
        "--let-teacher-dtype", "fp32", "--let-loss", "logsum", "--let-kd-weight", "0.3",
        "--let-kd-temperature", "2", "--let-kd-top-k", "8", "--let-kd-fade",
        "--let-teacher-compile", "--let-placement", "spread", "--let-max-prefetch", "4",
        "--let-projection", "learned",
    ]  # fmt: skip
    distillation: dict[str, Any] = {
        "kd_weight": 0.3, "kd_temperature": 2.0, "kd_top_k": 8, "kd_fade": True,
    }  # fmt: skip
    placed: dict[str, Any] = {
        "teacher_compile": True, "placement": "spread", "max_prefetch": 4,
        "projection": "learned",
    }  # fmt: skip
    expected = LETConfig(
        "let", Path("/t"), 5, 0.5, 7, "middle", False, "fp32", loss="logsum", **distillation,
        **placed,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="--let-kd-fade.* has no effect with --let-method let"):
        assert let_config_from_args(parse(*flags)) == expected
    default = LETConfig()
    unset = [n for n, v in dataclasses.asdict(expected).items() if v == getattr(default, n)]
    # It goes with the cosine only.
    assert unset == ["cross_tokenizer"], "all others are set to something else than the default"
    crossed = parse("--let-method", "let", "--let-teacher", "/t", "--let-cross-tokenizer")
    assert let_config_from_args(crossed).cross_tokenizer


def test_no_flags_are_method_none_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert let_config_from_args(parse()) == LETConfig()
        assert let_config_from_args(parse("--let-metrics-path", "m")) == LETConfig()


def test_flags_with_method_none_warn_and_are_named() -> None:
    with pytest.warns(UserWarning, match=r"--let-layer, --let-stop-step .*--let-method none"):
        config = let_config_from_args(parse("--let-layer", "2", "--let-stop-step", "5"))
    assert not config.enabled


def test_a_default_that_is_written_out_warns_too() -> None:
    with pytest.warns(UserWarning, match="--let-teacher-final-norm"):
        let_config_from_args(parse("--let-method", "none", "--let-teacher-final-norm"))


@pytest.mark.parametrize(
    ("flags", "student", "teacher"),
    [
        (("--let-layer-pair", "L2E"), 3, "last"),
        (("--let-layer-pair", "L2M"), 12, "last"),
        (("--let-layer-pair", "L2L"), 24, "last"),
        (("--let-layer-pair", "M2E"), 3, "middle"),
        (("--let-layer-pair", "M2M"), 12, "middle"),
        (("--let-layer-pair", "M2L"), 24, "middle"),
        (("--let-layer", "middle", "--let-teacher-layer", "5"), 12, "5"),
        (("--let-layer", "last"), 24, "last"),
        # As a recipe's settings come before the command line.
        (("--let-layer", "4", "--let-teacher-layer", "1", *PAIR), 12, "middle"),
        ((*PAIR, "--let-layer", "4"), 4, "middle"),
    ],
)
def test_layers_by_name(flags: tuple[str, ...], student: int, teacher: str) -> None:
    args = parse(*LET, *flags)
    args.num_layers = 24
    config = let_config_from_args(args)
    assert (config.layer, config.teacher_layer) == (student, teacher)


def test_middle_of_one_layer_is_that_layer() -> None:
    args = parse(*LET, "--let-layer", "middle")
    args.num_layers = 1
    assert let_config_from_args(args).layer == 1


def test_alignment_flags_with_distillation_warn_and_are_named() -> None:
    flags = ("--let-method", "rkd", "--let-teacher", "/t", "--let-layer", "2")
    with pytest.warns(UserWarning, match=r"^--let-layer has no effect with --let-method rkd\.$"):
        let_config_from_args(parse(*flags))


@pytest.mark.parametrize(
    "flag",
    ["--let-method=kd", "--let-layer=x", "--let-layer-pair=L2X", "--let-teacher-dtype=fp64"],
)
def test_value_of_the_wrong_kind_is_refused_by_the_parser(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(flag)
    assert flag.split("=")[0] in capsys.readouterr().err


# What of Megatron bypasses the hook


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cuda_graph_impl", "local"),
        ("cuda_graph_impl", "full_iteration"),
        ("overlap_moe_expert_parallel_comm", True),
        ("moe_expert_rank_capacity_factor", 1.0),
        ("hybrid_layer_pattern", "*-*-"),
        ("use_megatron_fsdp", True),
        ("use_torch_fsdp2", True),
        ("sft", True),
        ("reset_attention_mask", True),
        ("reset_position_ids", True),
        ("dataloader_inter_document_masking", True),
        ("hybrid_context_parallel", True),
        ("perform_rl_step", True),
        ("gtp_weight_remat_size", 2),
    ],
)
def test_flag_that_bypasses_the_hook_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(LETError, match="--let-method let cannot be used with --") as error:
        check_supported(argparse.Namespace(let_method="let", **{name: value}))
    assert_one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", "sgd"),
        ("optimizer_cuda_graph", True),
        ("ckpt_format", "torch"),
        ("ckpt_assume_constant_structure", True),
        ("non_persistent_save_interval", 5),
    ],
)
def test_flag_that_a_learned_projection_cannot_have_is_refused_by_name(
    name: str, value: object, parser: argparse.ArgumentParser
) -> None:
    given = {"let_method": "let", name: value}
    check_supported(argparse.Namespace(**given, let_projection="interpolate"))
    with pytest.raises(LETError, match="--let-projection learned cannot be used with --") as error:
        check_supported(argparse.Namespace(**given, let_projection="learned"))
    assert_one_sentence(str(error.value))
    assert_flags_exist(str(error.value), parser)


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """The parser of Megatron and LET together."""
    from megatron.training.arguments import add_megatron_arguments

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return add_arguments(add_megatron_arguments(argparse.ArgumentParser()))


def assert_flags_exist(message: str, parser: argparse.ArgumentParser) -> None:
    for flag in re.findall(r"--[a-z][\w-]+", message):
        assert flag in parser._option_string_actions, f"Megatron has no {flag}"


def test_megatrons_defaults_are_supported(parser: argparse.ArgumentParser) -> None:
    defaults = parser.parse_args([])
    check_supported(defaults)
    check_entry_supports(defaults)


@pytest.mark.parametrize("row", validation._REFUSED, ids=lambda row: row[0])
def test_refused_flag_is_one_that_a_user_can_give(
    row: tuple[str, Any, str], parser: argparse.ArgumentParser
) -> None:
    name, allowed, _ = row
    with pytest.raises(LETError) as error:
        value = "local" if allowed == "none" else 2
        check_supported(argparse.Namespace(let_method="let", **{name: value}))
    assert_flags_exist(str(error.value), parser)


@pytest.mark.parametrize("name", validation._NOT_IN_THE_ENTRY)
def test_flag_that_the_entry_would_ignore_is_refused_by_name(
    name: str, parser: argparse.ArgumentParser
) -> None:
    with pytest.raises(LETError, match="is not part of this entry") as error:
        check_entry_supports(argparse.Namespace(**{name: True}))
    assert_one_sentence(str(error.value))
    assert_flags_exist(str(error.value), parser)


# Teacher, student and run together


@pytest.mark.parametrize(
    ("config", "args", "expected"),
    [
        ({"layer": 25}, {}, "--let-layer is 25 but the student has 24 layers"),
        ({"teacher_layer": "13"}, {}, "--let-teacher-layer is 13 but the teacher has 12 layers"),
        (
            {"loss": "cca"},
            {"micro_batch_size": 2, "seq_length": 127},
            "the 64 features of the teacher over the 254 tokens of a microbatch, which chance alone"
            " would; raise --micro-batch-size to at least 3",
        ),
        ({}, {"seq_length": 2049}, "--seq-length is 2049 but the teacher was built for 2048"),
    ],
)
def test_what_does_not_fit_names_both_sizes(
    config: dict[str, Any], args: dict[str, Any], expected: str
) -> None:
    with pytest.raises(LETError) as error:
        check_fits(let_config(**config), FOLDER, megatron_args(**args))
    assert expected in str(error.value)
    assert_one_sentence(str(error.value))


def test_the_largest_values_that_fit_are_accepted() -> None:
    config = let_config(layer=24, teacher_layer="12", stop_step=7629)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fits(config, FOLDER, megatron_args(seq_length=2048))


def test_cca_takes_four_tokens_a_feature() -> None:
    check_fits(let_config(loss="cca"), FOLDER, megatron_args(micro_batch_size=2, seq_length=128))


def test_teacher_without_a_limit_of_positions_takes_any_sequence() -> None:
    unlimited = dataclasses.replace(FOLDER, max_positions=None)
    check_fits(let_config(), unlimited, megatron_args(seq_length=10**6))


@pytest.mark.parametrize(
    "length",
    [{"train_iters": 100}, {"train_iters": None, "train_samples": 100 * 2048}],
    ids=["iterations", "samples"],
)
def test_stop_step_beyond_the_run_warns(length: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="--let-stop-step 101 is beyond the run's 100 steps"):
        check_fits(let_config(stop_step=101), FOLDER, megatron_args(**length))


def test_run_of_no_steps_is_not_a_crash() -> None:
    """`--train-iters 0` evaluates a checkpoint."""
    with pytest.warns(UserWarning, match="beyond the run's 0 steps"):
        check_fits(let_config(), FOLDER, megatron_args(train_iters=0))


def test_vocabulary_must_not_exceed_the_teachers() -> None:
    check_vocabulary_size(FOLDER, 100)
    with pytest.raises(LETError, match="tokenizer has 101 tokens but the teacher knows 100"):
        check_vocabulary_size(FOLDER, 101)


# Where a run resumes


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    return tmp_path


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, 40),
        ({"finetune": True}, 0),
        ({"load": None}, 0),
        ({"ckpt_step": 20}, 20),
    ],
)
def test_step_of_a_resumed_run(checkpoints: Path, values: dict[str, Any], expected: int) -> None:
    args = megatron_args(**{"load": str(checkpoints), **values})
    assert resumed_step(args) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"load": "/runs/a", "iteration": 40}, Path("/runs/a/iter_0000040")),
        ({"load": "/runs/a", "iteration": 0}, None),
        ({"load": "/runs/a", "iteration": 40, "finetune": True}, None),
        ({"load": None, "iteration": 0}, None),
    ],
)
def test_checkpoint_that_a_run_goes_on_from(values: dict[str, Any], expected: Path | None) -> None:
    assert loaded_checkpoint(megatron_args(**values)) == expected


@pytest.mark.parametrize("content", [None, "release", ""])
def test_a_folder_without_an_iteration_starts_at_0(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(content)
    assert resumed_step(megatron_args(load=str(tmp_path))) == 0
