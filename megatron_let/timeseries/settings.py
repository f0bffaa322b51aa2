"""Settings of the time series experiment: configs/time_series.yaml, or a file of its form."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_let.config.recipes import find_recipe, line_of, load_yaml
from megatron_let.errors import LETError

# One section of the file, whose comments describe the settings.
Settings = Mapping[str, Any]


def load_settings(path: Path) -> dict[str, Settings]:
    """Load the sections `teacher` and `student` of a file, or of the packaged one of that name.

    Raises:
        LETError: it does not exist, or its settings or their types are not those of the packaged.
    """
    path = find_recipe(path)
    sections: dict[str, Settings] = load_yaml(path)
    _check(path, sections, load_yaml(find_recipe(Path("time_series"))))
    return sections


def _check(path: Path, value: Any, example: Any, *keys: str) -> None:
    if isinstance(example, dict):
        if not isinstance(value, dict) or value.keys() != example.keys():
            raise LETError(f"{line_of(path, *keys)}: give exactly {', '.join(example)}.")
        for key in example:
            _check(path, value[key], example[key], *keys, key)
    elif not _is_like(value, example):
        place, name = line_of(path, *keys), ".".join(keys)
        raise LETError(f"{place}: {name} is {value!r}; give a value such as {example!r}.")


def _is_like(value: Any, example: Any) -> bool:
    if isinstance(example, list):
        return bool(value) and type(value) is list and all(_is_like(v, example[0]) for v in value)
    if isinstance(example, float):
        return type(value) in (int, float) and 0 <= value < math.inf
    return type(value) is type(example) and (type(value) is str or value > 0)
