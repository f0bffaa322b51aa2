"""The sweep files in configs/, and their expansion into runs."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from megatron_let.config.recipes import RecipeError
from megatron_let.metrics.sweep import (
    Sweep,
    SweepRun,
    load_sweep,
    runs_of,
    sbatch_line,
    teacher_runs,
)
from tests.helpers.runs import ROOT

SWEEPS = sorted((ROOT / "configs").glob("sweep_*.yaml"))


def test_packaged_sweeps_cover_paper_ablations() -> None:
    names = {path.stem.removeprefix("sweep_") for path in SWEEPS}
    assert names >= {"methods", "layer_pairs", "lambda", "stop_step", "final_norm"}
    pairs = load_sweep(ROOT / "configs/sweep_layer_pairs.yaml")
    teacher, student = {"L": "last", "M": "middle"}, {"E": 3, "M": "middle", "L": "last"}
    assert {name: variant for name, variant in pairs.variants.items() if name != "baseline"} == {
        f"{t}2{s}": {"recipe": "let", "let-layer": student[s], "let-teacher-layer": teacher[t]}
        for t in teacher
        for s in student
    }
    weights = load_sweep(ROOT / "configs/sweep_lambda.yaml").variants
    assert [v["let-weight"] for v in weights.values() if "let-weight" in v] == [
        0.01,
        0.1,
        0.3,
        1,
        3,
    ]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_packaged_sweep_has_existing_recipes_and_flags(
    path: Path, parser: argparse.ArgumentParser
) -> None:
    sweep = load_sweep(path)
    students = runs_of(sweep, [1, 2], teachers={name: Path("x") for name in sweep.teachers})
    for run in teacher_runs(sweep).values():
        assert run.recipe.is_file() and run.num_steps > 0
        parser.parse_args(run.flags)
    for run in students:
        assert run.recipe.is_file() and run.num_steps > 0
        assert run.flags[:2] == ("--seed", run.name.rpartition("seed")[2])
        parser.parse_args(run.flags[2:])


def test_runs_are_ordered_by_seed_and_last_flag_wins() -> None:
    sweep = Sweep(
        "t", "base", {"r": ROOT / "configs/tiny.yaml"}, (7,),
        {"base": {"recipe": "r"}, "let": {"recipe": "r", "let-loss": "cca", "bf16": True,
                                          "let-teacher-final-norm": False, "train-iters": 5}},
    )  # fmt: skip
    assert [run.name for run in runs_of(sweep, [1, 2])] == [
        "base-seed1", "let-seed1", "base-seed2", "let-seed2",
    ]  # fmt: skip
    base, let = runs_of(sweep, more=["--lr", "1e-4"])
    assert let.flags == (
        "--seed", "7", "--let-loss", "cca", "--bf16", "--no-let-teacher-final-norm",
        "--train-iters", "5", "--lr", "1e-4",
    )  # fmt: skip
    assert (base.num_steps, let.num_steps) == (10, 5)
    assert runs_of(sweep, more=["--train-iters", "3"])[1].num_steps == 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"variants": {"let": {"recipe": "r"}}}, "line 2: baseline is base"),
        ({"variants": {"base": {"recipe": "x"}}}, "line 8: .*base has recipe 'x'; choose one of r"),
        ({"variants": {"base": {"recipe": "r"}, "a/b": {"recipe": "r"}}}, "a/b names a folder"),
        ({"seeds": []}, r"line 5: seeds is \[\]"),
        ({"seeds": 3}, "line 5: seeds is 3"),
        ({"seeds": [1, True]}, "line 5: seeds is"),
        ({"seeds": [1, 2, 1]}, "line 5: seeds is"),
        ({"recipes": ["configs/tiny.yaml"]}, "line 3: recipes is"),
        ({"recipes": {"r": None}}, "line 3: recipes is"),
        ({"variants": {"base": None}}, "line 8: variants.base is None"),
        ({"variants": [{"base": {"recipe": "r"}}]}, "line 7: variants is"),
        ({"variants": None}, "line 7: variants is"),
        ({"variants": {"base": {"recipe": "r", "lr": None}}}, "line 10: variants.base.lr is None"),
        ({"variants": {"base": {"recipe": "r", "lr": {"a": 1}}}}, "line 10: variants.base.lr is"),
        ({"more": 1}, "must have exactly baseline, recipes, seeds, title, variants"),
        ({"common": ["lr"]}, r"common is not a mapping"),
        ({"common": {"lr": None}}, r"variants.base.lr is None"),
        ({"teachers": {"t": 1}}, "line 11: teachers.t is 1"),
        ({"teachers": {"t": {"recipe": "x"}}}, "teachers.t has recipe 'x'"),
        ({"teachers": {"t": {"recipe": "r", "teacher": "t"}}}, "teachers.t has teacher 't'"),
        (
            {"variants": {"base": {"recipe": "r", "teacher": "t"}}},
            "base has teacher 't'; the file's teachers are: none",
        ),
    ],
)
def test_invalid_sweep_is_rejected(
    tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    good = {"title": "t", "baseline": "base", "recipes": {"r": "configs/tiny.yaml"},
            "seeds": [1], "variants": {"base": {"recipe": "r"}}}  # fmt: skip
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(good | change, sort_keys=False))
    with pytest.raises(RecipeError, match=expected):
        load_sweep(path)
    with pytest.raises(RecipeError, match="does not exist"):
        load_sweep(tmp_path / "nowhere.yaml")


def test_variant_given_twice_is_rejected_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("variants:\n  a: {recipe: r}\n  a: {recipe: s}\n")
    with pytest.raises(RecipeError, match="line 3: sets a twice"):
        load_sweep(path)


def test_list_of_values_follows_its_flag() -> None:
    recipe = ROOT / "configs/tiny.yaml"
    sweep = Sweep("t", "a", {"r": recipe}, (7,), {"a": {"recipe": "r", "data-path": [1, "x"]}})
    assert runs_of(sweep)[0].flags[2:] == ("--data-path", "1", "x")


def test_later_and_joined_values_of_a_flag_win() -> None:
    flags = (
        "--train-iters",
        "7",
        "--lr=1",
        "--train-iters=9",
        "--no-save",
        "--data-path",
        "1",
        "x",
    )
    run = SweepRun("a", 1, ROOT / "configs/tiny.yaml", flags)
    assert run.num_steps == 9
    found = {name: run.settings[name] for name in ("train-iters", "lr", "no-save", "data-path")}
    assert found == {"train-iters": "9", "lr": "1", "no-save": "", "data-path": "1 x"}


def test_sbatch_line_names_run_and_script(tmp_path: Path) -> None:
    sweep = load_sweep(ROOT / "configs/sweep_methods.yaml")
    sweep.recipes.update({m: ROOT / f"configs/{m}_7b.yaml" for m in ("baseline", "let")})
    for method in ("baseline", "let"):
        (tmp_path / f"pretrain_7b_{method}.sh").touch()
    lines = {run.name: sbatch_line(run, tmp_path, "mine") for run in runs_of(sweep)}
    assert lines["rkd-seed1234"] == (
        f"sbatch --job-name=mine-rkd-seed1234 {tmp_path}/pretrain_7b_let.sh --"
        " --seed 1234 --let-method rkd"
    )
    assert "pretrain_7b_baseline.sh" in lines["baseline-seed1234"]
    with pytest.raises(RecipeError, match=r"has no job script pretrain_7b_let\.sh"):
        sbatch_line(runs_of(sweep)[1], tmp_path / "elsewhere", "mine")


def test_teachers_are_trained_as_variants_and_given_to_their_students() -> None:
    recipe = ROOT / "configs/tiny.yaml"
    sweep = Sweep(
        "t", "base", {"r": recipe}, (7,),
        {"base": {"recipe": "r"}, "let-a": {"recipe": "r", "teacher": "a", "lr": 1}},
        {"a": {"recipe": "r", "train-iters": 5}, "b": {"recipe": "r", "seed": 3}},
    )  # fmt: skip
    teachers = teacher_runs(sweep)
    assert [(run.name, run.num_steps) for run in teachers.values()] == [
        ("teacher-a-seed1234", 5), ("teacher-b-seed3", 10)
    ]  # fmt: skip
    base, student = runs_of(sweep, teachers={"a": Path("/m/a")})
    assert base.flags == ("--seed", "7")
    assert student.flags == ("--seed", "7", "--lr", "1", "--let-teacher", "/m/a")
    assert (sweep.method("let-a"), sweep.method("base")) == ("let", "base")


def test_common_flags_are_those_of_every_variant(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    values = {"title": "t", "baseline": "a", "recipes": {"r": "configs/tiny.yaml"}, "seeds": [1],
              "common": {"lr": 1, "seq-length": 8}, "teachers": {"t": {"recipe": "r"}},
              "variants": {"a": {"recipe": "r"}, "b": {"recipe": "r", "lr": 2}}}  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    sweep = load_sweep(path)
    assert sweep.variants["a"] == {"lr": 1, "seq-length": 8, "recipe": "r"}
    assert sweep.variants["b"]["lr"] == 2 and sweep.teachers["t"] == {"recipe": "r"}
