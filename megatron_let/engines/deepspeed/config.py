"""The DeepSpeed config of a run: the user's file, completed from the args. Pure functions."""

from __future__ import annotations

import argparse
import copy
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_let.errors import LETError, first_line

Config = dict[str, Any]

# DeepSpeed silently ignores an unknown section, so every allowed one is listed.
_SECTIONS = frozenset({
    "aio", "bf16", "checkpoint", "comms_logger", "communication_data_type", "data_types",
    "dump_state", "flops_profiler", "gradient_accumulation_steps", "gradient_clipping",
    "memory_breakdown", "optimizer", "steps_per_print", "train_batch_size",
    "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "zero_force_ds_cpu_optimizer",
    "zero_optimization",
})  # fmt: skip

# Section -> what sets it instead, or why it is not supported.
_UNSUPPORTED = {
    "activation_checkpointing": "give --recompute-granularity instead",
    "amp": "give --bf16 instead",
    "curriculum_learning": "Megatron reads the data",
    "data_efficiency": "Megatron reads the data",
    "elasticity": "the batch size is --global-batch-size",
    "fp16": "fp16 is untested; give --bf16 instead",
    "pipeline": "use --engine megatron for pipelines",
    "scheduler": "the learning rate follows --lr-decay-style",
    "sequence_parallel_size": "give --sequence-parallel instead",
    "tensor_parallel": "give --tensor-model-parallel-size instead",
    "torch_autocast": "give --bf16 instead",
}

# DeepSpeed's names for the recipe's AdamW.
_ADAM_TYPES = ("Adam", "AdamW")


def config_from_args(args: argparse.Namespace, cuda: bool) -> Config:
    """Return the DeepSpeed config of a run: `--deepspeed-config`, completed from the args.

    Raises:
        LETError: the file cannot be read, or contradicts the args.
    """
    given = read_config(args.deepspeed_config) if args.deepspeed_config else {}
    return complete_config(given, args, fused_adam=cuda)


def read_config(path: Path) -> Config:
    """Read a user's DeepSpeed config.

    Raises:
        LETError: the file cannot be read, or is not a JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LETError(
            f"--deepspeed-config {path} cannot be read ({first_line(error)})."
        ) from error
    except ValueError as error:
        reason = first_line(error)
        raise LETError(f"--deepspeed-config {path} is not valid JSON ({reason}).") from error
    if not isinstance(config, dict):
        raise LETError(f"--deepspeed-config {path} is not a JSON object; give one in braces.")
    return config


def complete_config(given: Mapping[str, Any], args: argparse.Namespace, fused_adam: bool) -> Config:
    """Set every value that a user's config leaves out, or sets to "auto", from the args.

    Args:
        fused_adam: use torch's fused AdamW where the optimizer's state is not offloaded.

    Raises:
        LETError: the config contradicts the recipe, or has an unsupported section.
    """
    given = {n: v for n, v in given.items() if n not in _UNSUPPORTED or not _is_off(v)}
    _check_sections(given)
    config = _without_auto(copy.deepcopy(dict(given)))
    config.setdefault("zero_optimization", {})
    config["zero_optimization"].setdefault("stage", int(args.use_distributed_optimizer))
    stage = config["zero_optimization"]["stage"]
    for path, value, flag in _settings(args, stage):
        _set(config, path, value, flag)
    # It does not change the result, so the user's value is kept.
    if stage in (1, 2):
        config["zero_optimization"].setdefault("overlap_comm", args.overlap_grad_reduce)
    config.setdefault("steps_per_print", None)
    _choose_adam(config, fused_adam)
    return config


def zero_stage(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a completed config."""
    return int(config["zero_optimization"]["stage"])


def offloads_optimizer(config: Mapping[str, Any]) -> bool:
    """Return whether the optimizer's state is in host memory or on NVMe."""
    device = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    return device != "none"


def _settings(args: argparse.Namespace, stage: int) -> list[tuple[str, Any, str]]:
    """Return (dotted path, value, flag) of every value that the recipe sets."""
    adam = "optimizer.params."
    num_microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    settings = [
        ("train_micro_batch_size_per_gpu", args.micro_batch_size, "--micro-batch-size"),
        ("train_batch_size", args.global_batch_size, "--global-batch-size"),
        (
            "gradient_accumulation_steps",
            num_microbatches,
            "--global-batch-size over --micro-batch-size and the data-parallel size",
        ),
        ("gradient_clipping", args.clip_grad, "--clip-grad"),
        ("bf16.enabled", args.bf16, "--bf16"),
        ("optimizer.type", "AdamW", "--optimizer adam"),
        (adam + "lr", args.lr, "--lr"),
        (adam + "betas", [args.adam_beta1, args.adam_beta2], "--adam-beta1 and --adam-beta2"),
        (adam + "eps", args.adam_eps, "--adam-eps"),
        (adam + "weight_decay", args.weight_decay, "--weight-decay"),
    ]
    if args.bf16 and args.accumulate_allreduce_grads_in_fp32 and stage > 0:
        flag = "--accumulate-allreduce-grads-in-fp32, which --bf16 sets"
        settings += [
            ("data_types.grad_accum_dtype", "fp32", flag),
            ("communication_data_type", "fp32", flag),
        ]
    return settings


def _check_sections(given: Mapping[str, Any]) -> None:
    for name in given:
        if name in _UNSUPPORTED:
            raise LETError(f"--deepspeed-config sets {name}: {_UNSUPPORTED[name]}.")
        if name not in _SECTIONS:
            near = difflib.get_close_matches(name, _SECTIONS, n=1)
            hint = f"did you mean {near[0]}?" if near else "remove it."
            raise LETError(
                f"--deepspeed-config sets {name}, which this engine does not support; {hint}"
            )
    stage = given.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3, "auto"):
        raise LETError(f"--deepspeed-config sets zero_optimization.stage to {stage}; give 0 to 3.")


def _is_off(section: Any) -> bool:
    """Return whether a section such as fp16 is off, or "auto", which the args decide."""
    return isinstance(section, dict) and section.get("enabled") in (False, "auto")


def _without_auto(config: Config) -> Config:
    """Remove the values that are "auto", as in Hugging Face's configs."""
    kept: Config = {}
    for name, value in config.items():
        if isinstance(value, dict):
            kept[name] = _without_auto(value)
        elif value != "auto":
            kept[name] = value
    return kept


def _set(config: Config, path: str, value: Any, flag: str) -> None:
    """Set `value` at a dotted path.

    Raises:
        LETError: the config has a different value there.
    """
    *sections, name = path.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    found = config.setdefault(name, value)
    if not _same(found, value):
        raise LETError(
            f"--deepspeed-config sets {path} to {json.dumps(found)} but {flag} says"
            f" {json.dumps(value)}; remove one of the two."
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
    """Use torch's AdamW, which needs no compilation, unless its state is offloaded."""
    params = config["optimizer"]["params"]
    if not offloads_optimizer(config) and "torch_adam" not in params:
        params["torch_adam"] = True
        if fused_adam:
            params.setdefault("fused", True)
