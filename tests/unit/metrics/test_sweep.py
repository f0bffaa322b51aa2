"""Sweeps: the files in configs/, their runs, and a sweep of two short ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_let.config.recipes import RecipeError
from megatron_let.metrics.sweep import Sweep, load_sweep, runs_of, sbatch_line
from tests.helpers.runs import ROOT, environment

SWEEPS = sorted((ROOT / "configs").glob("sweep_*.yaml"))


def test_ready_sweeps() -> None:
    names = {path.stem.removeprefix("sweep_") for path in SWEEPS}
    assert names >= {"methods", "layer_pairs", "lambda", "stop_step", "final_norm"}
    pairs = load_sweep(ROOT / "configs/sweep_layer_pairs.yaml", ROOT)
    teacher, student = {"L": "last", "M": "middle"}, {"E": 3, "M": "middle", "L": "last"}
    assert {name: variant for name, variant in pairs.variants.items() if name != "baseline"} == {
        f"{t}2{s}": {"recipe": "let", "let-layer": student[s], "let-teacher-layer": teacher[t]}
        for t in teacher
        for s in student
    }
    weights = load_sweep(ROOT / "configs/sweep_lambda.yaml", ROOT).variants
    assert [v["let-weight"] for v in weights.values() if "let-weight" in v] == [
        0.01,
        0.1,
        0.3,
        1,
        3,
    ]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_each_run_is_a_recipe_and_flags_that_exist(path: Path) -> None:
    import argparse

    from megatron_let.config.arguments import add_arguments

    parser = add_arguments(argparse.ArgumentParser())
    for run in runs_of(load_sweep(path, ROOT), [1, 2]):
        assert run.recipe.is_file() and run.num_steps == 200
        assert run.flags[:2] == ("--seed", run.name.rpartition("seed")[2])
        parser.parse_args(run.flags[2:])


def test_runs_come_seed_by_seed_and_the_last_flag_wins() -> None:
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
        ({"variants": {"let": {"recipe": "r"}}}, "has no variant of its baseline's name"),
        ({"variants": {"base": {"recipe": "x"}}}, "has recipe 'x'; choose one of r"),
        ({"variants": {"base": {"recipe": "r"}, "a/b": {"recipe": "r"}}}, "'a/b' of .* a folder"),
        ({"seeds": []}, r"has seeds \[\]; give whole numbers"),
        ({"more": 1}, "must have exactly baseline, recipes, seeds, title, variants"),
    ],
)
def test_bad_sweeps_are_refused(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    good = {"title": "t", "baseline": "base", "recipes": {"r": "configs/tiny.yaml"},
            "seeds": [1], "variants": {"base": {"recipe": "r"}}}  # fmt: skip
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(good | change))
    with pytest.raises(RecipeError, match=expected):
        load_sweep(path, ROOT)
    with pytest.raises(RecipeError, match="does not exist"):
        load_sweep(tmp_path / "nowhere.yaml", ROOT)


def test_sbatch_lines_name_the_run_and_its_script(tmp_path: Path) -> None:
    sweep = load_sweep(ROOT / "configs/sweep_methods.yaml", ROOT)
    sweep.recipes.update({m: ROOT / f"configs/{m}_7b.yaml" for m in ("baseline", "let")})
    for method in ("baseline", "let"):
        (tmp_path / f"pretrain_7b_{method}.sh").touch()
    lines = {run.name: sbatch_line(run, tmp_path) for run in runs_of(sweep)}
    assert lines["rkd-seed1234"] == (
        f"sbatch --job-name=rkd-seed1234 {tmp_path}/pretrain_7b_let.sh --"
        " --seed 1234 --let-method rkd"
    )
    assert "pretrain_7b_baseline.sh" in lines["baseline-seed1234"]
    with pytest.raises(RecipeError, match=r"has no job script pretrain_7b_let\.sh"):
        sbatch_line(runs_of(sweep)[1], tmp_path / "elsewhere")


@pytest.mark.distributed
def test_sweep_runs_compares_and_is_not_done_twice(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        yaml.safe_dump(
            {
                "title": "Two",
                "baseline": "none",
                "recipes": {"tiny": str(ROOT / "configs/tiny.yaml")},
                "seeds": [1],
                "variants": {
                    "none": {"recipe": "tiny", "let-method": "none"},
                    "broken": {"recipe": "tiny", "let-layer": 9},
                    "let": {"recipe": "tiny"},
                },
            }
        )
    )
    output = tmp_path / "runs"
    command = [
        sys.executable, str(ROOT / "tools/sweep.py"), str(sweep), "--output", str(output), "--",
        "--data-path", str(data), "--train-iters", "5", "--let-stop-step", "3",
    ]  # fmt: skip
    variables = environment(TEACHER=str(teacher), DATA=str(data))
    first, second = (
        subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
        for _ in range(2)
    )
    # One that cannot run does not keep the others from it.
    assert first.returncode == second.returncode == 1, first.stdout + first.stderr
    assert "broken-seed1: The broken run failed:" in first.stderr
    assert "--let-layer is 9 but the student has 4" in first.stderr
    assert second.stdout.count("already done") == 2
    assert (output / "comparison" / "index.html").is_file()
    for name in ("none", "let"):
        rows = (output / name / "seed-1" / "metrics.jsonl").read_text().splitlines()
        assert sum("lm_loss" in json.loads(row) for row in rows) == 5
