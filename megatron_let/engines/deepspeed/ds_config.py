"""The DeepSpeed config of a run: the user's file, completed from the recipe. Pure functions."""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_let.engines.deepspeed.recipe import Recipe
from megatron_let.errors import LETError, first_line

Config = dict[str, Any]

# DeepSpeed passes over an unknown section in silence, so each one that may stand there is named.
_SECTIONS = frozenset(
    {
        "aio",
        "bf16",
        "checkpoint",
        "comms_logger",
        "communication_data_type",
        "data_types",
        "dump_state",
        "flops_profiler",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "memory_breakdown",
        "optimizer",
        "steps_per_print",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "wall_clock_breakdown",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)

# Section -> what sets it in Megatron's place, or why it cannot be.
_REFUSED = {
    "activation_checkpointing": "give --recompute-granularity instead",
    "amp": "give --bf16 instead",
    "curriculum_learning": "Megatron reads the data",
    "data_efficiency": "Megatron reads the data",
    "elasticity": "the batch size is --global-batch-size",
    "fp16": "fp16 was never tried with it; give --bf16 instead",
    "pipeline": "pipelines are Megatron's; use --engine megatron",
    "scheduler": "the learning rate follows --lr-decay-style",
    "sequence_parallel_size": "give --sequence-parallel instead",
    "tensor_parallel": "give --tensor-model-parallel-size instead",
    "torch_autocast": "give --bf16 instead",
}

# Optimizers of DeepSpeed that are the recipe's AdamW.
_ADAM_TYPES = ("Adam", "AdamW")


def read_config(path: Path) -> Config:
    """Read a user's DeepSpeed config.

    Raises:
        LETError: no such file, or no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LETError(
            f"--deepspeed-config {path} cannot be read ({first_line(error)})."
        ) from error
    except ValueError as error:
        raise LETError(f"--deepspeed-config {path} is no JSON ({first_line(error)}).") from error
    if not isinstance(config, dict):
        raise LETError(f"--deepspeed-config {path} is no JSON object but {type(config).__name__}.")
    return config


def complete_config(given: Mapping[str, Any], recipe: Recipe, fused_adam: bool) -> Config:
    """Complete a user's config with what the recipe says, where it is silent or says "auto".

    Args:
        given: the user's config; {} for none.
        recipe: of the run.
        fused_adam: torch's fused AdamW is to be used where the optimizer's state is not offloaded.

    Raises:
        LETError: the config contradicts the recipe, or has a section that is not DeepSpeed's to
            decide here.
    """
    _check_sections(given)
    config = _without_auto(copy.deepcopy(dict(given)))
    config.setdefault("zero_optimization", {})
    config["zero_optimization"].setdefault("stage", int(recipe.use_distributed_optimizer))
    stage = config["zero_optimization"]["stage"]
    for path, value, flag in _settings(recipe, stage):
        _set(config, path, value, flag)
    # Of no consequence to the result, so the user's word is taken.
    if stage in (1, 2):
        config["zero_optimization"].setdefault("overlap_comm", recipe.overlap_grad_reduce)
    config.setdefault("steps_per_print", None)
    _choose_adam(config, fused_adam)
    return config


def zero_stage(config: Mapping[str, Any]) -> int:
    """The ZeRO stage of a completed config."""
    return int(config["zero_optimization"]["stage"])


def offloads_optimizer(config: Mapping[str, Any]) -> bool:
    """Whether the optimizer's state is in the host's memory or on NVMe."""
    device = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    return device != "none"


def _settings(recipe: Recipe, stage: int) -> list[tuple[str, Any, str]]:
    """(dotted path, value, flag) of everything that the recipe decides."""
    adam = "optimizer.params."
    settings = [
        ("train_micro_batch_size_per_gpu", recipe.micro_batch_size, "--micro-batch-size"),
        ("train_batch_size", recipe.global_batch_size, "--global-batch-size"),
        (
            "gradient_accumulation_steps",
            recipe.num_microbatches,
            "--global-batch-size over --micro-batch-size and the data-parallel size",
        ),
        ("gradient_clipping", recipe.clip_grad, "--clip-grad"),
        ("bf16.enabled", recipe.bf16, "--bf16"),
        ("optimizer.type", "AdamW", "--optimizer adam"),
        (adam + "lr", recipe.lr, "--lr"),
        (adam + "betas", [recipe.adam_beta1, recipe.adam_beta2], "--adam-beta1 and --adam-beta2"),
        (adam + "eps", recipe.adam_eps, "--adam-eps"),
        (adam + "weight_decay", recipe.weight_decay, "--weight-decay"),
    ]
    if recipe.bf16 and recipe.grads_in_fp32 and stage > 0:
        flag = "--accumulate-allreduce-grads-in-fp32, which --bf16 sets"
        settings += [
            ("data_types.grad_accum_dtype", "fp32", flag),
            ("communication_data_type", "fp32", flag),
        ]
    return settings


def _check_sections(given: Mapping[str, Any]) -> None:
    for name in given:
        if name in _REFUSED:
            raise LETError(f"--deepspeed-config sets {name}: {_REFUSED[name]}.")
        if name not in _SECTIONS:
            near = difflib.get_close_matches(name, _SECTIONS, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; take it out."
            raise LETError(
                f"--deepspeed-config sets {name}, which means nothing to this engine{hint}"
            )
    stage = given.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3, "auto"):
        raise LETError(f"--deepspeed-config sets zero_optimization.stage to {stage}; give 0 to 3.")


def _without_auto(config: Config) -> Config:
    """Leave out what the file leaves to others, as Hugging Face's configs do with "auto"."""
    kept: Config = {}
    for name, value in config.items():
        if isinstance(value, dict):
            kept[name] = _without_auto(value)
        elif value != "auto":
            kept[name] = value
    return kept


def _set(config: Config, path: str, value: Any, flag: str) -> None:
    """Put `value` at a dotted path, or refuse another one that stands there."""
    *sections, name = path.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    found = config.setdefault(name, value)
    if not _same(found, value):
        raise LETError(
            f"--deepspeed-config sets {path} to {json.dumps(found)} but {flag} says"
            f" {json.dumps(value)}; take one of the two away."
        )


def _same(found: Any, value: Any) -> bool:
    if isinstance(value, list):
        return (
            isinstance(found, list) and len(found) == len(value) and all(map(_same, found, value))
        )
    if isinstance(value, str):
        return found == value or (found in _ADAM_TYPES and value in _ADAM_TYPES)
    if isinstance(value, bool) or isinstance(found, bool) or not isinstance(found, int | float):
        return found is value
    return math.isclose(found, value, rel_tol=1e-9)


def _choose_adam(config: Config, fused_adam: bool) -> None:
    """Use torch's AdamW, which nothing has to be compiled for, unless its state is offloaded."""
    params = config["optimizer"]["params"]
    if not offloads_optimizer(config) and "torch_adam" not in params:
        params["torch_adam"] = True
        if fused_adam:
            params.setdefault("fused", True)
