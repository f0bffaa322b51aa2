"""Each argument of the model reaches the model's config, or is known to need another flag."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import re
from typing import Any

import pytest
import torch

from megatron_let.config.argument_needs import read_needs
from megatron_let.config.megatron_arguments import read_lists
from megatron_let.config.model_config import gpt_config
from tests.helpers.runs import ROOT

MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64"
    " --max-position-embeddings 64 --vocab-size 256 --micro-batch-size 1 --ffn-hidden-size 128"
    " --kv-channels 16 --transformer-impl local --no-rope-fusion --no-masked-softmax-fusion"
    " --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion"
    " --no-gradient-accumulation-fusion --no-persist-layer-norm"
)
# Arguments of `layers` that Megatron's validation turns into others before the config is made.
TRANSLATED = {
    "add_position_embedding": "--position-embedding-type",
    "encoder_num_layers": "--num-layers",
    "use_rotary_position_embeddings": "--position-embedding-type",
}


def parse(parser: argparse.ArgumentParser, *flags: str) -> argparse.Namespace:
    args = parser.parse_args([*MODEL.split(), *flags])
    # What Megatron's validation adds.
    args.params_dtype, args.virtual_pipeline_model_parallel_size = torch.float32, None
    return args


def fields_of(config: Any) -> dict[str, str]:
    """Return {field: value as text} of a config and the configs in it."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{name}": text for name, text in fields_of(value).items()}
        else:
            # A partial function without its address.
            text = (value.func, value.args, value.keywords) if hasattr(value, "func") else value
            found[field.name] = repr(text)
    return found


def other_value(action: argparse.Action, value: Any) -> Any:
    """Return a value of the argument that differs from `value`."""
    if isinstance(value, bool):
        return not value
    if action.choices:
        return next(choice for choice in action.choices if choice != value)
    if isinstance(value, int | float):
        return value * 2 or 1
    return {int: 2, float: 0.5, None: ["x"] if action.nargs else "x"}.get(action.type, "x")


def test_each_argument_of_the_model_changes_its_config(parser: argparse.ArgumentParser) -> None:
    needs = {name: flag for flag, names in read_needs()["model"].items() for name in names}
    actions = {action.dest: action for action in reversed(parser._actions)}
    unread = set()
    for name in read_lists()["layers"]:
        flags = needs.get(name, "").partition(" or ")[0].split()
        if len(flags) == 1 and parser._option_string_actions[flags[0]].nargs is None:
            flags.append("2")
        args = parse(parser, *flags)
        changed = copy.deepcopy(args)
        setattr(changed, name, other_value(actions[name], getattr(args, name)))
        try:
            other = gpt_config(changed)
        except (AssertionError, TypeError, ValueError):
            continue  # the config reads it and rejects the combination
        if fields_of(other) == fields_of(gpt_config(args)):
            unread.add(name)
    assert unread == TRANSLATED.keys()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factor_of_rope_scaling_reaches_the_model(
    parser: argparse.ArgumentParser, factor: float
) -> None:
    args = parse(parser, "--use-rope-scaling", "--rope-scaling-factor", str(factor))
    assert gpt_config(args).rope_scaling_factor == factor


def test_models_of_all_engines_are_made_here() -> None:
    """Megatron's function alone drops an argument."""
    callers = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "megatron_let").rglob("*.py")
        if re.search(
            r"^\s*(from .* import|.*=|return) .*\bgpt_config_from_args\b", path.read_text(), re.M
        )
    ]
    assert callers == ["megatron_let/config/model_config.py"]
