"""Sweeps: a YAML file of variants, expanded into runs. Nothing is started here."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_let.config.recipes import (
    RecipeError,
    find_recipe,
    line_of,
    load_recipe,
    load_yaml,
    value_of,
)

_KEYS = {"title", "baseline", "recipes", "seeds", "variants"}
_OPTIONAL_KEYS = {"common", "teachers"}


@dataclass(frozen=True)
class Sweep:
    """The contents of a sweep file.

    Attributes:
        baseline: name of the variant that the others are compared with.
        recipes: recipe files by the names that variants use.
        variants: `recipe` and flags without the dashes, by name; `teacher` names one of `teachers`.
            They include the file's `common` flags.
        teachers: models to train first, as variants of a recipe; each has the recipe's seed.
    """

    title: str
    baseline: str
    recipes: dict[str, Path]
    seeds: tuple[int, ...]
    variants: dict[str, dict[str, Any]]
    teachers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def method(self, variant: str) -> str:
        """Return the name of a variant without its teacher: `let` of `let-small`."""
        return variant.removesuffix(f"-{self.variants[variant].get('teacher')}")


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep; its flags come after the recipe."""

    variant: str
    seed: int
    recipe: Path
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the name of the run and of its job."""
        return f"{self.variant}-seed{self.seed}"

    @property
    def num_steps(self) -> int:
        """Return `--train-iters` of the flags, else of the recipe.

        Raises:
            RecipeError: neither sets it.
        """
        steps = value_of("--train-iters", self.flags)
        steps = steps or load_recipe(self.recipe).get("train-iters")
        if steps is None:
            raise RecipeError(f"The recipe {self.recipe} has no train-iters, which a sweep needs.")
        return int(steps)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the recipe's settings and the flags' values as text, by name without dashes."""
        given: dict[str, list[str]] = {}
        name = ""
        for word in self.flags:
            if word.startswith("--"):
                name, separator, value = word[2:].partition("=")
                given[name] = [value] if separator else []
            else:
                given[name].append(word)
        return load_recipe(self.recipe) | {name: " ".join(words) for name, words in given.items()}


def load_sweep(path: Path) -> Sweep:
    """Load a sweep file.

    Args:
        path: the file, or the name of a packaged sweep, such as `sweep_methods`. Its recipes are
            files beside it or in the current folder, or names of packaged recipes.

    Raises:
        RecipeError: the file does not exist or is not a valid sweep.
    """
    try:
        path = find_recipe(path)
    except RecipeError:
        raise RecipeError(
            f"The sweep {path} does not exist; give a file, or a name such as sweep_methods."
        ) from None
    values = load_yaml(path)
    if not isinstance(values, dict) or values.keys() - _OPTIONAL_KEYS != _KEYS:
        names, more = (", ".join(sorted(keys)) for keys in (_KEYS, _OPTIONAL_KEYS))
        raise RecipeError(f"The sweep {path} must have exactly {names}, and may have {more}.")
    values = dict[str, Any](common={}, teachers={}) | values
    _check_types(path, values)
    sweep = Sweep(
        title=str(values["title"]),
        baseline=str(values["baseline"]),
        recipes={name: _recipe(path, file) for name, file in values["recipes"].items()},
        seeds=tuple(values["seeds"]),
        variants={str(n): values["common"] | flags for n, flags in values["variants"].items()},
        teachers={str(n): dict(flags) for n, flags in values["teachers"].items()},
    )
    if sweep.baseline not in sweep.variants:
        raise _error(path, f"is {sweep.baseline}, which is not one of the variants", "baseline")
    for part, entries in (("variants", sweep.variants), ("teachers", sweep.teachers)):
        for name, flags in entries.items():
            _check_entry(path, sweep, part, name, flags)
    return sweep


def _recipe(sweep: Path, file: str) -> Path:
    """Find a recipe relative to the sweep or to the checkout; else `file` as it is."""
    candidates = (sweep.parent / file, Path(__file__).resolve().parents[2] / file)
    return next((path for path in candidates if path.is_file()), Path(file))


def _check_types(path: Path, values: dict[str, Any]) -> None:
    """Check each part of a sweep file before anything is built from it."""
    seeds, recipes, variants = values["seeds"], values["recipes"], values["variants"]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise _error(path, f"is {seeds!r}; give a list of whole numbers, such as [1, 2]", "seeds")
    if len(set(seeds)) < len(seeds):
        raise _error(path, f"is {seeds!r}; give each seed once", "seeds")
    if not isinstance(recipes, dict) or not all(isinstance(r, str) for r in recipes.values()):
        raise _error(path, f"is {recipes!r}; give NAME: FILE for each recipe", "recipes")
    if not isinstance(values["common"], dict):
        raise _error(path, "is not a mapping; give flags of every variant", "common")
    for part, entries in (("variants", variants), ("teachers", values["teachers"])):
        if not isinstance(entries, dict):
            raise _error(path, "is not a mapping; give NAME: {recipe: RECIPE}", part)
        for name, flags in entries.items():
            if not isinstance(flags, dict):
                problem = f"is {flags!r}; give `recipe: RECIPE` and flags without their dashes"
                raise _error(path, problem, part, name)


def _check_entry(path: Path, sweep: Sweep, part: str, name: str, flags: dict[str, Any]) -> None:
    """Check a variant, or a teacher, which has no teacher itself."""
    recipe, names = flags.get("recipe"), ", ".join(sweep.recipes)
    if recipe not in sweep.recipes:
        raise _error(path, f"has recipe {recipe!r}; choose one of {names}", part, name)
    if not re.fullmatch(r"[\w.-]+", name):
        raise _error(path, "names a folder; use letters, digits and ._-", part, name)
    known = sweep.teachers if part == "variants" else {}
    if flags.get("teacher") not in {None, *known}:
        names = ", ".join(known) or "none"
        problem = f"has teacher {flags['teacher']!r}; the file's teachers are: {names}"
        raise _error(path, problem, part, name)
    for flag, value in flags.items():
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float) for item in items):
            raise _error(path, f"is {value!r}; give a value", part, name, flag)


def _error(path: Path, problem: str, *keys: Any) -> RecipeError:
    return RecipeError(f"{line_of(path, *keys)}: {'.'.join(map(str, keys))} {problem}.")


def runs_of(
    sweep: Sweep,
    seeds: Sequence[int] = (),
    more: Sequence[str] = (),
    teachers: Mapping[str, Path] | None = None,
) -> list[SweepRun]:
    """Return all runs, ordered by seed, so that an interrupted sweep has complete comparisons.

    Args:
        seeds: seeds in place of the sweep's.
        more: flags of every run, after those of its variant.
        teachers: model folder of each of the sweep's teachers.
    """
    return [
        SweepRun(
            variant=name,
            seed=seed,
            recipe=sweep.recipes[flags["recipe"]],
            flags=("--seed", str(seed), *flags_of(flags | _teacher(flags, teachers)), *more),
        )
        for seed in seeds or sweep.seeds
        for name, flags in sweep.variants.items()
    ]


def _teacher(flags: Mapping[str, Any], teachers: Mapping[str, Path] | None) -> dict[str, Any]:
    return {"let-teacher": str((teachers or {})[flags["teacher"]])} if "teacher" in flags else {}


def teacher_runs(sweep: Sweep) -> dict[str, SweepRun]:
    """Return the run that trains each of the sweep's teachers."""
    runs = {}
    for name, flags in sweep.teachers.items():
        recipe = sweep.recipes[flags["recipe"]]
        seed = int(flags.get("seed", load_recipe(recipe).get("seed", 1234)))
        runs[name] = SweepRun(f"teacher-{name}", seed, recipe, tuple(flags_of(flags)))
    return runs


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Return the flags of settings, named without the dashes; a switch is True or False."""
    flags: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{name}")
        elif name not in ("recipe", "teacher"):
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def sbatch_line(run: SweepRun, launch: Path, sweep: str) -> str:
    """Return the command that submits a run whose recipe is named METHOD_SIZE.yaml.

    The job's name, which is its folder's, begins with `sweep`.

    Raises:
        RecipeError: the folder `launch` has no job script for the recipe.
    """
    method, _, size = run.recipe.stem.partition("_")
    script = launch / f"pretrain_{size}_{method}.sh"
    if not script.is_file():
        raise RecipeError(
            f"The recipe {run.recipe.name} has no job script {script.name}; give others by"
            " --recipe NAME=configs/METHOD_SIZE.yaml."
        )
    return shlex.join(["sbatch", f"--job-name={sweep}-{run.name}", str(script), "--", *run.flags])
