"""Figures of compared runs, with seeds, unfinished runs and different settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_let.errors import LETError
from megatron_let.metrics.compare import (
    Variant,
    compare,
    differences,
    find_baseline,
    load_run,
    steps_to_reach,
    teacher_step_cost,
)
from megatron_let.metrics.read import load_metrics
from tests.helpers.metrics_files import write_run

BASE = {20: 6.0, 40: 5.0}
LET = {20: 5.5, 30: 4.9, 40: 4.8}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    let = {"let_method": "let", "let_weight": 0.1}
    return (
        write_run(tmp_path / "baseline", BASE, settings={}, downstream=40.0),
        write_run(tmp_path / "let", LET, teacher_steps=10, settings=let, downstream=42.5),
    )


def means(variant: Variant) -> dict[str, float | None]:
    return {key: spread and spread.mean for key, spread in variant.figures.items()}


@pytest.mark.parametrize(
    ("losses", "target", "expected"),
    [
        ({10: 5.0, 20: 4.0, 30: 3.0}, 4.0, 20.0),
        ({10: 5.0, 20: 4.0, 30: 3.0}, 3.5, 25.0),
        ({10: 5.0, 20: 4.0, 30: 3.0}, 2.9, None),
        ({10: 5.0, 20: 4.0}, 6.0, 10.0),
        ({10: 5.0, 20: 3.0, 30: 4.0, 40: 2.0}, 3.5, 17.5),
        ({}, 1.0, None),
        # Without a limit, rounding gives 206.00000000000003.
        ({1: 2.9540802346548807, 206: 2.00001}, 2.00001, 206.0),
    ],
)
def test_steps_to_reach_interpolates_between_evaluations(
    losses: dict[int, float], target: float, expected: float | None
) -> None:
    assert steps_to_reach(losses, target) == expected


@given(
    st.dictionaries(st.integers(1, 1000), st.floats(0.1, 10), min_size=1),
    st.floats(0.05, 11),
)
def test_steps_to_reach_is_between_surrounding_evaluations(
    losses: dict[int, float], target: float
) -> None:
    reached = steps_to_reach(losses, target)
    below = [s for s in sorted(losses) if losses[s] <= target]
    assert (reached is None) == (not below)
    if reached is not None:
        before = [s for s in losses if s < below[0]]
        assert max(before, default=below[0]) <= reached <= below[0]


@pytest.mark.parametrize(
    ("teacher_steps", "of_baseline", "expected"),
    [(10, 0, 2.0), (40, 0, 2.0), (0, 0, None), (40, 40, None)],
    ids=["some steps", "all steps", "no step", "no step without"],
)
def test_teacher_step_cost_is_ratio_of_medians(
    tmp_path: Path, teacher_steps: int, of_baseline: int, expected: float | None
) -> None:
    run, baseline = (
        load_metrics(write_run(tmp_path / name, {}, teacher_steps=number) / "metrics.jsonl")
        for name, number in (("run", teacher_steps), ("baseline", of_baseline))
    )
    assert teacher_step_cost(run, baseline) == expected


def test_figures_match_values_computed_by_hand(two: tuple[Path, Path]) -> None:
    baseline, let = compare([load_run(path.name, path) for path in reversed(two)], "baseline")
    assert (baseline.name, let.name) == ("baseline", "let")
    # 5.0 is 5/6 of the way from 5.5 at step 20 to 4.9 at step 30.
    step = 20 + 10 * 5 / 6
    # Ten steps of 4 s with the teacher, then 2 s each; the baseline's forty took 80 s.
    seconds = 40 + 2 * (step - 10)
    assert means(let) == pytest.approx(
        {
            "final_loss": 4.8,
            "difference": 4.8 - 5.0,
            "steps_to_target": step,
            "speed_up": 40 / step,
            "seconds_to_target": seconds,
            "time_speed_up": 80 / seconds,
            "training_seconds": 100.0,
            "tokens_per_second": 50.0,
            "teacher_step_cost": 2.0,
            "peak_memory_bytes": 40 * 2**20,
            "downstream": 42.5,
        }
    )
    assert means(baseline)["speed_up"] == 1.0
    assert let.notes == [] and baseline.notes == []


def test_seeds_are_compared_with_baseline_of_same_seed(tmp_path: Path) -> None:
    runs = []
    for seed, offset in ((1, 0.0), (2, 1.0)):
        for name, valid in (("baseline", BASE), ("let", LET)):
            settings = {"seed": seed, "let_method": "none" if name == "baseline" else "let"}
            moved = {step: loss + offset for step, loss in valid.items()}
            folder = tmp_path / f"{name}{seed}"
            runs.append(load_run(name, write_run(folder, moved, settings=settings)))
    _, let = compare(runs, "baseline")
    loss, speed_up = let.figures["final_loss"], let.figures["speed_up"]
    assert loss is not None and speed_up is not None
    assert (loss.low, loss.high, loss.count) == (4.8, 5.8, 2)
    assert speed_up.low == pytest.approx(speed_up.high)
    assert let.notes == []


def test_run_equal_to_a_baseline_that_ends_higher_has_no_speed_up(tmp_path: Path) -> None:
    curve = {20: 4.8, 30: 4.9, 40: 5.0}
    runs = [
        load_run(name, write_run(tmp_path / name, curve, settings={"let_method": method}))
        for name, method in (("baseline", "none"), ("let", "let"))
    ]
    for variant in compare(runs, "baseline"):
        assert (means(variant)["speed_up"], means(variant)["time_speed_up"]) == (1.0, 1.0)


def test_changed_setting_and_other_evaluation_are_noted(tmp_path: Path) -> None:
    base = write_run(tmp_path / "baseline", BASE, settings={}, downstream=40.0)
    let = write_run(tmp_path / "let", LET, settings={"let_method": "let"}, downstream=41.0)
    with (let / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"iteration": 20, "changed": {"lr": [0.1, 1e-3]}}) + "\n")
    results = let / "evaluation/results.json"
    results.write_text(json.dumps(json.loads(results.read_text()) | {"limit": "10"}))
    _, variant = compare([load_run(path.name, path) for path in (base, let)], "baseline")
    assert any("lr was changed from 0.1 to 0.001 at step 20" in note for note in variant.notes)
    assert any("downstream" in note and "'10'" in note for note in variant.notes)


@pytest.mark.parametrize(
    ("model", "found"),
    [("checkpoints", True), ("{}/checkpoints/iter_0000001", True), ("{}/../elsewhere", False),
     ("/gone/runs/let/checkpoints", True), ("/gone/elsewhere", False)],
)  # fmt: skip
def test_downstream_scores_of_the_run_are_found_and_others_named(
    tmp_path: Path, model: str, found: bool
) -> None:
    let = write_run(tmp_path / "let", LET, settings={"let_method": "let"}, downstream=41.0)
    # A link to another disk.
    (let / "checkpoints").rename(tmp_path / "disk")
    (let / "checkpoints").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/iter_0000001").mkdir()
    (tmp_path / "elsewhere").mkdir()
    row = {"model": model.format(let), "tokens": None, "average": 41.0, "results": []}
    (let / "evaluation/results.json").write_text(json.dumps({"models": [row]}))
    run = load_run("let", let)
    assert run.downstream == (41.0 if found else None)
    baseline = load_run("baseline", write_run(tmp_path / "baseline", BASE, settings={}))
    notes = compare([baseline, run], "baseline")[1].notes
    assert found != any(row["model"] in note for note in notes)


def test_interval_needs_the_same_seed(tmp_path: Path) -> None:
    runs = [
        load_run(name, write_run(tmp_path / f"{name}{seed}", BASE, settings={"seed": seed}))
        for name, seed in (("baseline", 1), ("let", 1), ("other", 2))
    ]
    for run in runs:
        run.metrics.valid_microbatches[40] = [5.0, 4.0, 6.0]
    _, let, other = compare(runs, "baseline")
    assert let.interval == (0.0, 0.0) and other.interval is None


def test_run_that_never_reaches_baseline_has_no_speed_up(tmp_path: Path) -> None:
    worse = write_run(tmp_path / "b", {20: 7.0, 40: 5.1}, settings={"let_method": "let"})
    runs = [load_run("baseline", write_run(tmp_path / "a", BASE)), load_run("let", worse)]
    _, let = compare(runs, "baseline")
    assert let.num_reached == 0
    assert let.figures["steps_to_target"] is None and let.figures["speed_up"] is None


def test_unfinished_and_empty_runs_are_noted(tmp_path: Path) -> None:
    baseline = write_run(tmp_path / "baseline", BASE, settings={})
    short = write_run(tmp_path / "short", {20: 5.9}, steps=25, settings={"let_method": "let"})
    # A kill in the middle of a line, and a step that was lost and repeated.
    with (short / "metrics.jsonl").open("a") as stream:
        row = {"iteration": 25, "lm_loss": 4.0, "step_seconds": 2.0, "tokens_per_second": 50.0}
        stream.write(json.dumps(row | {"max_memory_bytes": 1}) + '\n{"iteration": 26, "lm_l')
    empty = write_run(tmp_path / "empty", {}, steps=0, settings={"let_method": "let"})
    runs = [load_run(path.name, path) for path in (baseline, short, empty)]
    variants = compare(runs, "baseline")
    assert runs[1].seconds()[25] == 50.0
    assert variants[1].notes == ["short: unfinished, 25 of 40 steps"]
    assert "empty: unfinished, no step was taken" in variants[2].notes


def drop_steps(folder: Path, *dropped: int) -> Path:
    """Remove the training rows of some steps from a run's metrics."""
    metrics = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    kept = [row for row in rows if "lm_loss" not in row or row["iteration"] not in dropped]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return folder


@pytest.mark.parametrize("dropped", [(13, 14), (33,), (20,), (24, 26, 28), (40,)])
def test_missing_rows_leave_speed_up_as_it_was(tmp_path: Path, dropped: tuple[int, ...]) -> None:
    whole = write_run(tmp_path / "let", LET, settings={"let_method": "let"})
    gaps = drop_steps(write_run(tmp_path / "gaps", LET, settings={"let_method": "let"}), *dropped)
    baseline = load_run("baseline", write_run(tmp_path / "a", BASE, settings={}))
    _, expected, found = compare(
        [baseline, load_run("let", whole), load_run("gaps", gaps)], "baseline"
    )
    for key in ("steps_to_target", "speed_up", "time_speed_up", "seconds_to_target"):
        assert means(found)[key] == pytest.approx(means(expected)[key])
    assert any(str(dropped[0]) in note for note in found.notes) or dropped == (40,)


@pytest.mark.parametrize("first", [2, 11])
@pytest.mark.parametrize("which", ["baseline", "let"])
def test_time_is_unknown_without_the_first_rows(tmp_path: Path, first: int, which: str) -> None:
    folders = {name: write_run(tmp_path / name, losses, settings={})
               for name, losses in (("baseline", BASE), ("let", LET))}  # fmt: skip
    drop_steps(folders[which], *range(1, first))
    variants = compare([load_run(name, path) for name, path in folders.items()], "baseline")
    figures = means(variants[1])
    assert figures["time_speed_up"] is None and figures["speed_up"] == pytest.approx(40 / (85 / 3))
    noted = variants[["baseline", "let"].index(which)].notes
    assert len(noted) == 1 and "unknown" in noted[0]


def test_diverged_run_is_marked_and_others_are_compared(tmp_path: Path) -> None:
    baseline = load_run("baseline", write_run(tmp_path / "a", BASE, settings={}))
    let = load_run("let", write_run(tmp_path / "b", LET, settings={"let_method": "let"}))
    folder = write_run(tmp_path / "c", {20: 6.0}, settings={"let_method": "let"})
    rows = [{"iteration": step, "lm_loss": None, "step_seconds": 2.0, "tokens_per_second": 50.0,
             "max_memory_bytes": 1} for step in range(25, 41)]  # fmt: skip
    with (folder / "metrics.jsonl").open("a") as stream:
        for row in [*rows, {"iteration": 40, "valid_loss": None}]:
            stream.write(json.dumps(row) + "\n")
    diverged = load_run("high_rate", folder)
    _, good, bad = compare([baseline, let, diverged], "baseline")
    assert good.num_reached == 1 and good.notes == []
    assert bad.num_reached == 0 and any("diverged at step 25" in note for note in bad.notes)
    assert bad.figures["final_loss"] is None
    # With a diverged baseline there is nothing to reach.
    first, other = compare([diverged, let], "high_rate")
    assert not first.has_target and other.figures["speed_up"] is None


def test_different_settings_are_listed(tmp_path: Path) -> None:
    # Of an older version, which did not store swiglu.
    old = {"settings": {"clip_grad": None}}
    baseline = load_run("baseline", write_run(tmp_path / "a", BASE, settings=old))
    other = {
        "let_method": "let",
        "let_weight": 0.3,
        "lr": 3e-3,
        "settings": {"clip_grad": 1.0, "swiglu": True},
    }
    let = load_run("let", write_run(tmp_path / "b", LET, settings=other))
    assert differences(let, baseline) == [
        "lr is 0.003, the baseline's 0.001",
        "clip_grad is 1.0, the baseline's None",
    ]
    seed = load_run("let", write_run(tmp_path / "c", LET, settings=other | {"seed": 5}))
    assert any("seed is 5" in text for text in differences(seed, baseline))
    unknown = load_run("x", write_run(tmp_path / "d", LET))
    assert len(differences(unknown, baseline)) == 1


def test_default_baseline_is_run_without_teacher(two: tuple[Path, Path]) -> None:
    runs = [load_run(path.name, path) for path in two]
    assert find_baseline(runs, None) == "baseline"
    assert find_baseline(runs, "let") == "let"
    with pytest.raises(LETError, match="--baseline is rkd but the runs are baseline, let"):
        find_baseline(runs, "rkd")
    with pytest.raises(LETError, match="--baseline NAME"):
        find_baseline(runs[1:], None)
