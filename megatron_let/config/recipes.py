"""Expand a recipe, the YAML file of a complete run, into a Megatron command line."""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_let.errors import LETError

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_FOLDER = "${RECIPE_FOLDER}"


class RecipeError(LETError):
    """A recipe that cannot be expanded."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses duplicate keys, of which PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in keys:
                problem = f"sets {key} twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            keys.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def load_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe and return one map from setting to value.

    A setting is the name of a flag without its dashes; sections only order the file.
    `${RECIPE_FOLDER}` is the folder of the recipe.

    Raises:
        RecipeError: the file does not exist, is not YAML, or has a setting twice.
    """
    path = find_recipe(path)
    document = load_yaml(path)
    if not isinstance(document, Mapping) or not all(
        isinstance(section, Mapping) for section in document.values()
    ):
        raise RecipeError(f"The recipe {path} must be sections of `name: value` settings.")
    settings: dict[str, Any] = {}
    for section in document.values():
        for name, value in section.items():
            if name in settings:
                raise RecipeError(f"The recipe {path} sets {name} twice.")
            settings[str(name)] = _in_folder(value, path.parent)
    return settings


def value_of(flag: str, words: Sequence[str]) -> str | None:
    """Return the last value of `--flag VALUE` or `--flag=VALUE` in a command line, as argparse."""
    found = None
    for word, following in itertools.zip_longest(words, words[1:]):
        name, separator, value = word.partition("=")
        if name == flag:
            found = value if separator else following
    return found


def load_yaml(path: Path) -> Any:
    """Load a YAML file.

    Raises:
        RecipeError: it is not valid YAML, or sets a key twice; gives the line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}, line {line}: {error.problem}; give valid YAML.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path} is not valid YAML: {reason}.") from error


def line_of(path: Path, *keys: Any) -> str:
    """Return the place of a nested key of a valid YAML file, as `PATH, line N`."""
    line, node = 1, yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    for key in keys:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((k, v) for k, v in pairs if k.value == str(key)), None)
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return f"{path}, line {line}"


def find_recipe(path: Path) -> Path:
    """Return `path` if it is a file, else the packaged recipe of that name, such as `let_7b`.

    Raises:
        RecipeError: neither exists; lists the packaged recipes.
    """
    if path.is_file():
        return path
    # A wheel has configs/ as megatron_let/recipes; a checkout has it beside the package.
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    folder = installed if installed.is_dir() else package.parent / "configs"
    packaged = folder / f"{path.name.removesuffix('.yaml')}.yaml"
    if len(path.parts) == 1 and packaged.is_file():
        return packaged
    names = [file.stem for file in sorted(folder.glob("*.yaml"))]
    raise RecipeError(
        f"The recipe {path} does not exist; give a file, or one of"
        f" {', '.join(name for name in names if not name.startswith(('sweep_', 'time_')))}."
    )


def _in_folder(value: Any, folder: Path) -> Any:
    return value.replace(_FOLDER, str(folder)) if isinstance(value, str) else value


def recipe_argv(
    settings: Mapping[str, Any],
    parser: argparse.ArgumentParser,
    command_line: list[str],
    variables: Mapping[str, str] = os.environ,
) -> list[str]:
    """Return the settings as arguments, followed by the command line, which overrides them.

    A flag on the command line replaces the recipe's; `--no-NAME` removes a switch that the recipe
    sets. `${NAME}` in a value is an environment variable, required only if the flag is not on the
    command line.

    Raises:
        RecipeError: an unknown setting, a value of the wrong kind, or a missing variable.
    """
    actions = {option: a for a in parser._actions for option in a.option_strings}
    given = {token.split("=", 1)[0] for token in command_line if token.startswith("--")}
    given_dests = {actions[option].dest for option in given if option in actions}
    argv: list[str] = []
    dropped: set[str] = set()
    for name, value in settings.items():
        option = "--" + name
        if option not in actions:
            raise RecipeError(_unknown(name, actions))
        negative = "--no-" + name
        if negative in given and negative not in actions:
            dropped.add(negative)
        elif actions[option].dest not in given_dests:
            argv += _expand(option, value, actions[option], variables)
    return argv + [token for token in command_line if token not in dropped]


def _unknown(name: str, actions: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches("--" + name, actions, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0][2:]}?" if near else "."
    return f"The recipe sets {name}, which is not a flag of Megatron or LET{hint}"


def _expand(
    option: str, value: Any, action: argparse.Action, variables: Mapping[str, str]
) -> list[str]:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise RecipeError(f"The recipe sets {option[2:]} to {value!r}; it is true or false.")
        if value:
            return [option]
        negative = "--no-" + option[2:]
        return [negative] if negative in action.option_strings else []
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and action.nargs in (None, "?"):
        raise RecipeError(f"The recipe sets {option[2:]} to {value!r}; it takes one value.")
    texts = []
    for item in values:
        if isinstance(item, bool | dict | list) or item is None:
            raise RecipeError(f"The recipe sets {option[2:]} to {value!r}; it takes a value.")
        texts.append(_substitute(option, str(item), variables))
        _check_value(option, value, texts[-1], action)
    return [option, *texts]


def _check_value(option: str, value: Any, text: str, action: argparse.Action) -> None:
    """Reject in one sentence a value for which argparse would print its usage."""
    try:
        converted = action.type(text) if callable(action.type) else text
    except (ValueError, TypeError, argparse.ArgumentTypeError, KeyError) as error:
        kind = getattr(action.type, "__name__", str(action.type))
        raise RecipeError(f"The recipe sets {option[2:]} to {value!r}; it takes {kind}.") from error
    if action.choices is not None and converted not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise RecipeError(f"The recipe sets {option[2:]} to {value!r}; choose one of {choices}.")


def _substitute(option: str, value: str, variables: Mapping[str, str]) -> str:
    for name in _VARIABLE.findall(value):
        if not variables.get(name):
            raise RecipeError(
                f"The recipe needs the environment variable {name} for {option}; export it, or"
                f" give {option} on the command line."
            )
    return _VARIABLE.sub(lambda match: variables[match[1]], value)
