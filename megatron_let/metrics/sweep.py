"""A sweep: one YAML file of variants, expanded into runs. Pure; nothing is started here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_let.config.recipes import RecipeError, load_recipe

_KEYS = {"title", "baseline", "recipes", "seeds", "variants"}


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    Attributes:
        title: of its page.
        baseline: name of the variant that the others are held against.
        recipes: recipe files by the names that variants use.
        seeds: that each variant is run with.
        variants: by name, `recipe` and flags without the dashes.
    """

    title: str
    baseline: str
    recipes: dict[str, Path]
    seeds: tuple[int, ...]
    variants: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        variant: the name that it shares with other seeds.
        seed: its seed.
        recipe: file.
        flags: after the recipe.
    """

    variant: str
    seed: int
    recipe: Path
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the run, as a job's name and below the sweep's folder."""
        return f"{self.variant}-seed{self.seed}"

    @property
    def num_steps(self) -> int:
        """`--train-iters` of the flags, else of the recipe.

        Raises:
            RecipeError: neither says.
        """
        for flag, value in zip(reversed(self.flags[:-1]), reversed(self.flags[1:]), strict=True):
            if flag == "--train-iters":
                return int(value)
        steps = load_recipe(self.recipe).get("train-iters")
        if steps is None:
            raise RecipeError(f"The recipe {self.recipe} has no train-iters, which a sweep needs.")
        return int(steps)


def load_sweep(path: Path, root: Path) -> Sweep:
    """Read a sweep file.

    Args:
        path: the file.
        root: folder that its recipes are relative to.

    Raises:
        RecipeError: no such file, or what it says cannot be run.
    """
    if not path.is_file():
        raise RecipeError(f"The sweep {path} does not exist; see configs/sweep_*.yaml.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"The sweep {path} is no YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(values, dict) or values.keys() != _KEYS:
        raise RecipeError(f"The sweep {path} must have exactly {', '.join(sorted(_KEYS))}.")
    sweep = Sweep(
        title=str(values["title"]),
        baseline=str(values["baseline"]),
        recipes={name: root / file for name, file in values["recipes"].items()},
        seeds=tuple(values["seeds"]),
        variants={str(name): dict(flags) for name, flags in values["variants"].items()},
    )
    _check(path, sweep)
    return sweep


def _check(path: Path, sweep: Sweep) -> None:
    if sweep.baseline not in sweep.variants:
        raise RecipeError(f"The sweep {path} has no variant of its baseline's name.")
    if not sweep.seeds or not all(isinstance(seed, int) for seed in sweep.seeds):
        raise RecipeError(f"The sweep {path} has seeds {list(sweep.seeds)}; give whole numbers.")
    for name, flags in sweep.variants.items():
        if flags.get("recipe") not in sweep.recipes:
            known = ", ".join(sweep.recipes)
            raise RecipeError(
                f"The variant {name} of {path} has recipe {flags.get('recipe')!r}; choose one of"
                f" {known}."
            )
        if not re.fullmatch(r"[\w.-]+", name):
            raise RecipeError(f"The variant {name!r} of {path} names a folder; use letters and .-_")


def runs_of(sweep: Sweep, seeds: Sequence[int] = (), more: Sequence[str] = ()) -> list[SweepRun]:
    """All runs, seed by seed, so that a sweep that is stopped early has whole comparisons.

    Args:
        seeds: instead of the sweep's.
        more: flags of every run, after those of its variant.
    """
    return [
        SweepRun(
            variant=name,
            seed=seed,
            recipe=sweep.recipes[flags["recipe"]],
            flags=("--seed", str(seed), *_flags(flags), *more),
        )
        for seed in seeds or sweep.seeds
        for name, flags in sweep.variants.items()
    ]


def _flags(settings: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{name}")
        elif name != "recipe":
            flags += [f"--{name}", str(value)]
    return flags


def sbatch_line(run: SweepRun, launch: Path) -> str:
    """What submits a run of one of the recipes that has a job script.

    Raises:
        RecipeError: its recipe has none.
    """
    method, _, size = run.recipe.stem.partition("_")
    script = launch / f"pretrain_{size}_{method}.sh"
    if not script.is_file():
        raise RecipeError(
            f"The recipe {run.recipe.name} has no job script {script.name}; give others by"
            " --recipe NAME=configs/METHOD_SIZE.yaml."
        )
    return shlex.join(["sbatch", f"--job-name={run.name}", str(script), "--", *run.flags])
