"""The DeepSpeed config follows from the recipe; what contradicts it is refused."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_let.config.validation import check_teacher_shard
from megatron_let.engines.deepspeed import refusals
from megatron_let.engines.deepspeed.checkpoint_info import (
    CheckpointInfo,
    plan_resume,
    read_info,
    refuse_deepspeeds,
    universal_folder,
    write_info,
)
from megatron_let.engines.deepspeed.ds_config import complete_config, read_config
from megatron_let.engines.deepspeed.recipe import Recipe
from megatron_let.errors import LETError
from megatron_let.files.names import checkpoint_name
from tests.helpers.runs import ROOT

RECIPE = Recipe(
    micro_batch_size=4,
    global_batch_size=64,
    data_parallel_size=8,
    clip_grad=1.0,
    bf16=True,
    grads_in_fp32=True,
    lr=3e-4,
    adam_beta1=0.9,
    adam_beta2=0.999,
    adam_eps=1e-8,
    weight_decay=0.01,
    use_distributed_optimizer=True,
    overlap_grad_reduce=True,
)
OFFLOAD = {"stage": 3, "offload_optimizer": {"device": "cpu"}}


def complete(given: dict[str, Any], fused_adam: bool = True, **changes: Any) -> dict[str, Any]:
    return complete_config(given, dataclasses.replace(RECIPE, **changes), fused_adam)


def test_silent_config_is_completed_from_the_recipe() -> None:
    assert complete({}) == {
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": 64,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 3e-4,
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "weight_decay": 0.01,
                "torch_adam": True,
                "fused": True,
            },
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 1, "overlap_comm": True},
        "steps_per_print": None,
    }


def test_auto_is_silence() -> None:
    auto = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "zero_optimization": {"stage": "auto", "overlap_comm": "auto"},
    }
    assert complete(auto) == complete({})


def test_the_users_config_is_not_changed() -> None:
    given = {"zero_optimization": {"stage": 2}}
    complete(given)
    assert given == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("changes", "stage", "path", "value"),
    [
        ({"use_distributed_optimizer": False, "bf16": False}, None, "zero_optimization.stage", 0),
        ({"overlap_grad_reduce": False}, None, "zero_optimization.overlap_comm", False),
        ({"overlap_grad_reduce": True}, 3, "zero_optimization.overlap_comm", None),
        ({"bf16": False}, None, "data_types", None),
        ({"bf16": True}, 0, "data_types", None),
        ({"bf16": True}, 3, "data_types.grad_accum_dtype", "fp32"),
        ({"clip_grad": 0.0}, None, "gradient_clipping", 0.0),
    ],
)
def test_values_follow_the_recipe(
    changes: dict[str, Any], stage: int | None, path: str, value: Any
) -> None:
    found: Any = complete(
        {} if stage is None else {"zero_optimization": {"stage": stage}}, **changes
    )
    for name in path.split("."):
        found = (found or {}).get(name)
    assert found == value


@pytest.mark.parametrize(
    ("zero", "fused_adam", "params"),
    [
        ({"stage": 1}, True, {"torch_adam": True, "fused": True}),
        ({"stage": 1}, False, {"torch_adam": True}),
        (OFFLOAD, True, {}),
        ({"stage": 1, "offload_optimizer": {"device": "none"}}, False, {"torch_adam": True}),
    ],
)
def test_offloaded_state_is_stepped_by_deepspeeds_cpu_adam(
    zero: dict[str, Any], fused_adam: bool, params: dict[str, Any]
) -> None:
    found = complete({"zero_optimization": zero}, fused_adam)["optimizer"]["params"]
    assert {name: found[name] for name in ("torch_adam", "fused") if name in found} == params


def test_the_user_chooses_deepspeeds_fused_adam() -> None:
    given = {"optimizer": {"type": "Adam", "params": {"torch_adam": False}}}
    assert complete(given)["optimizer"]["params"]["torch_adam"] is False


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_batch_size": 32}, "train_batch_size to 32 but --global-batch-size says 64"),
        (
            {"train_micro_batch_size_per_gpu": 2},
            "train_micro_batch_size_per_gpu to 2 but --micro-batch-size says 4",
        ),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps to 4 but .* says 2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping to 0.5 but --clip-grad says 1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled to false but --bf16 says true"),
        (
            {"optimizer": {"type": "Lamb"}},
            'optimizer.type to "Lamb" but --optimizer adam says "AdamW"',
        ),
        (
            {"optimizer": {"params": {"lr": 1e-3}}},
            r"optimizer.params.lr to 0.001 but --lr says 0.0003",
        ),
        (
            {"optimizer": {"params": {"betas": [0.9, 0.95]}}},
            r"betas to \[0.9, 0.95\] but --adam-beta1 and --adam-beta2 says \[0.9, 0.999\]",
        ),
        ({"optimizer": {"params": {"weight_decay": 0.1}}}, "--weight-decay says 0.01"),
        ({"communication_data_type": "bf16"}, 'to "bf16" but .* says "fp32"'),
    ],
)
def test_contradiction_names_both_values(given: dict[str, Any], message: str) -> None:
    with pytest.raises(LETError, match=message):
        complete(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheduler": {}}, "scheduler: the learning rate follows --lr-decay-style"),
        ({"fp16": {"enabled": True}}, "fp16: .*give --bf16"),
        ({"zero_optimisation": {}}, "did you mean zero_optimization"),
        ({"colour": 1}, "colour, which means nothing to this engine"),
        ({"zero_optimization": {"stage": 4}}, "stage to 4; give 0 to 3"),
    ],
)
def test_section_that_would_be_passed_over_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(LETError, match=message):
        complete(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("{", "is no JSON"), ("[]", "no JSON object but list")],
)
def test_file_that_is_no_config(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    with pytest.raises(LETError, match=message):
        read_config(tmp_path / "ds.json")


# Flags


@pytest.mark.parametrize("row", refusals._REFUSED, ids=lambda row: row[0])
def test_impossible_flag_is_named_with_what_to_do(row: tuple[Any, ...]) -> None:
    name, possible, flag, _ = row
    refusals.check_supported(argparse.Namespace(**{name: possible[0]}))
    with pytest.raises(LETError, match=re.escape(f"cannot be used with {flag} ")) as caught:
        refusals.check_supported(argparse.Namespace(**{name: "other"}))
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "name",
    [
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "rampup_batch_size",
    ],
)
def test_layouts_of_megatrons_engine_point_to_it(name: str) -> None:
    with pytest.raises(LETError, match="use --engine megatron"):
        refusals.check_supported(argparse.Namespace(**{name: 2}))


def test_switches_that_deepspeed_replaces_are_off_and_named() -> None:
    args = argparse.Namespace(**dict.fromkeys(refusals._TAKEN_OVER, False))
    args.overlap_param_gather = args.async_save = True
    lines: list[str] = []
    refusals.take_over(args, lines.append)
    assert not args.overlap_param_gather and not args.async_save
    assert len(lines) == 1 and "--overlap-param-gather" in lines[0] and "--async-save" in lines[0]


# Resuming


def checkpoint(folder: Path, stage: int, dp: int, tp: int) -> Path:
    folder.mkdir()
    write_info(folder, CheckpointInfo(5, stage, dp, tp))
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_same_layout_resumes_plainly(tmp_path: Path, stage: int) -> None:
    folder = checkpoint(tmp_path / checkpoint_name(5), stage, 2, 2)
    resume = plan_resume(folder, CheckpointInfo(0, stage, 2, 2), universal_exists=True)
    assert (resume.folder, resume.universal) == (folder, False)


@pytest.mark.parametrize(("stage", "universal"), [(0, False), (1, True), (2, True), (3, True)])
def test_other_number_of_replicas_resumes_the_universal_form(
    tmp_path: Path, stage: int, universal: bool
) -> None:
    folder = checkpoint(tmp_path / checkpoint_name(5), stage, 2, 1)
    resume = plan_resume(folder, CheckpointInfo(0, stage, 4, 1), universal_exists=True)
    assert resume.universal == universal
    assert resume.folder == (universal_folder(folder) if universal else folder)


@pytest.mark.parametrize(
    ("saved", "now", "message"),
    [
        ((1, 2, 2), (1, 4, 1), "tensor parallel size 2 but the run 1; give --tensor-model"),
        ((1, 2, 1), (2, 2, 1), "of ZeRO stage 1 but the run of 2; set zero_optimization.stage"),
        ((1, 2, 1), (1, 4, 1), "data-parallel size 2 but the run 4; convert it by python -m"),
        ((3, 2, 2), (3, 4, 2), "resume on 2 replicas"),
    ],
)
def test_resume_that_would_not_be_exact_is_refused(
    tmp_path: Path, saved: tuple[int, int, int], now: tuple[int, int, int], message: str
) -> None:
    folder = checkpoint(tmp_path / checkpoint_name(5), *saved)
    with pytest.raises(LETError, match=message):
        plan_resume(folder, CheckpointInfo(0, *now), universal_exists=False)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "is not of --engine deepspeed"), ("{}", "is damaged")]
)
def test_folder_that_is_no_deepspeed_checkpoint(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "deepspeed.json").write_text(text)
    with pytest.raises(LETError, match=message):
        read_info(tmp_path)


def test_megatrons_engine_refuses_a_deepspeed_checkpoint(tmp_path: Path) -> None:
    refuse_deepspeeds(tmp_path)
    folder = checkpoint(tmp_path / checkpoint_name(5), 1, 2, 1)
    with pytest.raises(LETError, match="is of --engine deepspeed; resume it with that"):
        refuse_deepspeeds(folder)


@pytest.mark.parametrize(
    ("engine", "method", "message"),
    [
        ("megatron", "let", "cannot be used with --engine megatron"),
        ("deepspeed", "rkd", "cannot be used with --let-method rkd"),
        ("deepspeed", "salt", "cannot be used with --let-method salt"),
    ],
)
def test_teacher_is_sharded_only_where_it_can_be(engine: str, method: str, message: str) -> None:
    check_teacher_shard(
        argparse.Namespace(engine=engine, let_method=method, let_teacher_shard=False)
    )
    with pytest.raises(LETError, match=message):
        check_teacher_shard(
            argparse.Namespace(engine=engine, let_method=method, let_teacher_shard=True)
        )


# DeepSpeed is an extra


def imported_at_the_top(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize(
    "file", ["launch", "ds_config", "recipe", "refusals", "checkpoint_info", "export"]
)
def test_what_is_imported_without_the_engine_does_without_deepspeed(file: str) -> None:
    path = ROOT / f"megatron_let/engines/deepspeed/{file}.py"
    assert "deepspeed" not in imported_at_the_top(path)


def test_nothing_else_imports_deepspeed() -> None:
    room = ROOT / "megatron_let/engines/deepspeed"
    for path in [*(ROOT / "megatron_let").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        if not path.is_relative_to(room):
            text = path.read_text()
            assert not re.search(r"^\s*(import|from) deepspeed", text, re.MULTILINE), path


def test_recipes_deepspeed_configs_fit_their_engine() -> None:
    for path in (ROOT / "configs/deepspeed").glob("*.json"):
        complete(json.loads(path.read_text()))
