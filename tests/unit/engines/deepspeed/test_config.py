"""The DeepSpeed config of a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_let.engines.deepspeed.config import complete_config, read_config
from megatron_let.errors import LETError
from tests.helpers.runs import ROOT

RECIPE = dict(
    micro_batch_size=4,
    global_batch_size=64,
    data_parallel_size=8,
    clip_grad=1.0,
    bf16=True,
    accumulate_allreduce_grads_in_fp32=True,
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
    return complete_config(given, argparse.Namespace(**(RECIPE | changes)), fused_adam)


def test_empty_config_is_completed_from_the_recipe() -> None:
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


def test_auto_is_completed_like_a_missing_value() -> None:
    auto = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "zero_optimization": {"stage": "auto", "overlap_comm": "auto"},
    }
    assert complete(auto) == complete({})


@pytest.mark.parametrize("enabled", [False, "auto"])
def test_unsupported_section_that_is_off_is_ignored(enabled: Any) -> None:
    given = {"fp16": {"enabled": enabled, "loss_scale": 0}, "amp": {"enabled": enabled}}
    assert complete(given) == complete({})


def test_given_config_is_not_modified() -> None:
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
def test_offloaded_optimizer_uses_deepspeed_cpu_adam(
    zero: dict[str, Any], fused_adam: bool, params: dict[str, Any]
) -> None:
    found = complete({"zero_optimization": zero}, fused_adam)["optimizer"]["params"]
    assert {name: found[name] for name in ("torch_adam", "fused") if name in found} == params


def test_torch_adam_false_is_kept() -> None:
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
def test_contradiction_error_names_both_values(given: dict[str, Any], message: str) -> None:
    with pytest.raises(LETError, match=message):
        complete(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheduler": {}}, "scheduler: .*--lr-decay-style"),
        ({"fp16": {"enabled": True}}, "fp16: .*give --bf16"),
        ({"zero_optimisation": {}}, "did you mean zero_optimization"),
        ({"colour": 1}, "sets colour"),
        ({"zero_optimization": {"stage": 4}}, "stage to 4; give 0 to 3"),
    ],
)
def test_unsupported_section_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(LETError, match=message):
        complete(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("{", "not valid JSON"), ("[]", "not a JSON object")],
)
def test_unreadable_config_file_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    with pytest.raises(LETError, match=message):
        read_config(tmp_path / "ds.json")


def test_configs_of_the_recipes_are_supported() -> None:
    for path in (ROOT / "configs/deepspeed").glob("*.json"):
        complete(json.loads(path.read_text()))
