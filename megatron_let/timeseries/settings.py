"""Settings of the time series experiment: configs/time_series.yaml, or a file of its form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_let.config.recipes import find_recipe, line_of, load_yaml
from megatron_let.errors import LETError

# One section of the file.
Settings = Mapping[str, Any]


def load_settings(path: Path) -> dict[str, Settings]:
    """Load a settings file, or the packaged one of that name, whose comments describe them.

    Returns:
        The sections `teacher` and `student`.

    Raises:
        LETError: it does not exist, or its settings or their types are not those of the packaged.
    """
    path = find_recipe(path)
    found, packaged = load_yaml(path), load_yaml(find_recipe(Path("time_series")))
    _check_keys(str(path), found, packaged)
    for section, settings in packaged.items():
        _check_keys(line_of(path, section), found[section], settings)
        for name, example in settings.items():
            value = found[section][name]
            if not _is_like(value, example):
                place = line_of(path, section, name)
                raise LETError(f"{place}: {name} is {value!r}; give a value such as {example!r}.")
    sections: dict[str, Settings] = found
    return sections


def _check_keys(place: str, values: Any, names: Settings) -> None:
    if not isinstance(values, Mapping) or values.keys() != names.keys():
        raise LETError(f"{place}: give exactly {', '.join(names)}.")


def _is_like(value: Any, example: Any) -> bool:
    if isinstance(example, list):
        is_list = isinstance(value, list) and bool(value)
        return is_list and all(_is_like(item, example[0]) for item in value)
    if isinstance(example, float):
        return type(value) in (int, float) and 0 <= value < math.inf
    return type(value) is type(example) and (value > 0 if isinstance(value, int) else True)
