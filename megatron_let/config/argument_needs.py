"""Find Megatron arguments that have no effect because a flag that they belong to is not given.

`argument_needs.yaml` is the table.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator
from importlib.resources import files

import yaml

from megatron_let.config.megatron_arguments import as_written
from megatron_let.errors import LETError


@functools.cache
def read_needs() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return {"model" or "run": {flags, some with a value, joined by " or ": arguments}}."""
    text = files(__package__).joinpath("argument_needs.yaml").read_text(encoding="utf-8")
    return {
        part: {given: tuple(names.split()) for given, names in needs.items()}
        for part, needs in yaml.safe_load(text).items()
    }


def check_needs(
    args: argparse.Namespace, actions: Iterable[argparse.Action], report: Callable[[str], None]
) -> None:
    """Check that each argument that differs from its default can have an effect.

    Args:
        args: the parsed arguments, before Megatron's validation.
        actions: those of Megatron's parser, which give the defaults and the flags.
        report: called with a sentence for an argument that changes no model.

    Raises:
        LETError: an argument of the model has no effect; names the flag that is missing.
    """
    by_option = {option: action for action in actions for option in action.option_strings}
    for written, given in _without_effect(args, by_option, "model"):
        raise LETError(
            f"{written} has no effect without {given}; give that too, or drop"
            f" {written.partition(' ')[0]}."
        )
    for written, given in _without_effect(args, by_option, "run"):
        report(f"{written} has no effect without {given}")


def _without_effect(
    args: argparse.Namespace, by_option: dict[str, argparse.Action], part: str
) -> Iterator[tuple[str, str]]:
    """Yield (argument as written, flag that it needs)."""
    # Of several flags of one argument, argparse takes the default of the first.
    by_name = {action.dest: action for action in reversed(by_option.values())}
    for given, names in read_needs()[part].items():
        if any(_is_given(args, by_option, each) for each in given.split(" or ")):
            continue
        for action in (by_name[name] for name in names):
            value = getattr(args, action.dest, action.default)
            if value != action.default:
                yield as_written(action, value), given


def _is_given(args: argparse.Namespace, by_option: dict[str, argparse.Action], given: str) -> bool:
    option, _, value = given.partition(" ")
    action = by_option[option]
    actual = getattr(args, action.dest, action.default)
    return str(actual) == value if value else bool(actual)
