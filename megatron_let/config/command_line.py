"""The command line of the entry: a recipe and the flags after it, parsed once."""

from __future__ import annotations

import argparse
import difflib
import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from megatron_let.config.argument_needs import check_needs
from megatron_let.config.arguments import add_arguments
from megatron_let.config.megatron_arguments import check_known, check_layers
from megatron_let.config.recipes import load_recipe, recipe_argv
from megatron_let.errors import LETError


def parse_command_line(
    argv: list[str],
    host_flags: list[str],
    check: Callable[[argparse.Namespace], None],
    cuda: bool = True,
    report: Callable[[str], None] = print,
) -> argparse.Namespace:
    """Parse `[--config RECIPE] [flags]` into Megatron's validated, global arguments.

    Args:
        argv: arguments after the program's name; they override the recipe's.
        host_flags: Megatron flags that this host needs; the recipe and `argv` override them.
        check: called with the parsed arguments before Megatron validates them.
        report: called with a sentence for each flag that has no effect in this run.

    Raises:
        RecipeError: the recipe cannot be expanded.
        LETError: from `check`, or a flag of Megatron has no effect in this run.
    """
    from megatron.training.arguments import parse_and_validate_args

    entry = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    entry.add_argument("--config", type=Path)
    known, flags = entry.parse_known_args(argv)
    recipe = {} if known.config is None else load_recipe(known.config)

    actions: list[argparse.Action] = []

    def parse(parser: argparse.ArgumentParser) -> SimpleNamespace:
        actions.extend(parser._actions)
        add_arguments(parser)
        _escape_percent_signs(parser)
        # Instead of a usage of eight hundred flags.
        parser.error = functools.partial(_refuse, parser)  # type: ignore[method-assign]
        args = parser.parse_args([*host_flags, *recipe_argv(recipe, parser, flags)])
        # Before Megatron's validation, whose assertions would name unrelated flags. Megatron takes
        # the arguments from parse_args() of what this returns, so the flags are parsed once.
        check(args)
        check_known(args, actions, cuda)
        if not args.use_checkpoint_args:
            check_needs(args, actions, report)
        return SimpleNamespace(parse_args=lambda: args)

    args: argparse.Namespace = parse_and_validate_args(extra_args_provider=parse)
    # Again, because --use-checkpoint-args takes the model from the checkpoint.
    check_layers(args, actions)
    return args


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    near = difflib.get_close_matches(message.split()[2], parser._option_string_actions, 1, 0.75)
    hint = f"did you mean {near[0]}?" if near and "unrecognized" in message else "see --help."
    raise LETError(f"The command line has {message}; {hint}")


def _escape_percent_signs(parser: argparse.ArgumentParser) -> None:
    # 0.19.2 has a bare "10%)" in a help text, on which argparse's --help fails.
    for action in parser._actions:
        if action.help and action.help != argparse.SUPPRESS:
            action.help = re.sub(r"(?<!%)%(?![%(])", "%%", action.help)
