"""Runs compared: figures by hand, ragged and unfinished runs, and the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_let.errors import LETError
from megatron_let.metrics.compare import compare, differences, find_baseline, load_run
from megatron_let.metrics.report import COLUMNS, notes, table_rows, write_comparison
from tools import compare_runs

SETTINGS = {"let_method": "none", "seed": 1, "lr": 1e-3, "train_iters": 40, "settings": {}}


def write_run(
    folder: Path,
    valid: dict[int, float],
    steps: int = 40,
    seconds: float = 2.0,
    teacher_steps: int = 0,
    settings: dict[str, Any] | None = None,
    downstream: float | None = None,
) -> Path:
    """A run's folder: every step takes `seconds`, twice as long with a teacher."""
    (folder / "checkpoints").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        taught = step <= teacher_steps
        time = seconds * (2 if taught else 1)
        row = {"iteration": step, "lm_loss": 5.0, "step_seconds": time,
               "tokens_per_second": 100 / time, "max_memory_bytes": step * 2**20}  # fmt: skip
        rows.append(row | ({"let_cosine": 0.5, "let_weight": 0.1} if taught else {}))
        if step in valid:
            rows.append({"iteration": step, "valid_loss": valid[step]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if settings is not None:
        (folder / "checkpoints" / "run.json").write_text(
            json.dumps(SETTINGS | {"let_metrics_path": str(folder)} | settings)
        )
    if downstream is not None:
        (folder / "evaluation").mkdir()
        models = [{"tokens": 10, "average": 1.0}, {"tokens": 20, "average": downstream}]
        (folder / "evaluation" / "results.json").write_text(json.dumps({"models": models}))
    return folder


BASE = {20: 6.0, 40: 5.0}
LET = {20: 5.5, 30: 4.9, 40: 4.8}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    let = {"let_method": "let", "let_weight": 0.1}
    return (
        write_run(tmp_path / "baseline", BASE, settings={}, downstream=40.0),
        write_run(tmp_path / "let", LET, teacher_steps=10, settings=let, downstream=42.5),
    )


def test_figures_by_hand(two: tuple[Path, Path]) -> None:
    baseline, let = compare([load_run(path.name, path) for path in reversed(two)], "baseline")
    assert (baseline.name, let.name) == ("baseline", "let")
    assert let.final_loss is not None and let.final_loss.mean == 4.8
    # 5.0 lies 5/6 of the way from 5.5 at step 20 to 4.9 at step 30.
    step = 20 + 10 * 5 / 6
    assert let.steps_to_target is not None and let.speed_up is not None
    assert let.steps_to_target.mean == pytest.approx(step)
    assert let.speed_up.mean == pytest.approx(40 / step)
    # Ten steps of 4 s with the teacher, then 2 s each; the baseline's forty took 80 s.
    assert let.seconds_to_target is not None and let.time_speed_up is not None
    assert let.seconds_to_target.mean == pytest.approx(40 + 2 * (step - 10))
    assert let.time_speed_up.mean == pytest.approx(80 / (40 + 2 * (step - 10)))
    assert let.teacher_step_cost is not None and let.teacher_step_cost.mean == pytest.approx(2.0)
    assert let.downstream is not None and let.downstream.mean == 42.5
    assert let.peak_memory_bytes is not None and let.peak_memory_bytes.mean == 40 * 2**20
    assert baseline.speed_up is not None and baseline.speed_up.mean == 1.0
    assert let.notes == [] and baseline.notes == []


def test_seeds_are_held_against_the_baseline_of_their_own_seed(tmp_path: Path) -> None:
    runs = []
    for seed, offset in ((1, 0.0), (2, 1.0)):
        for name, valid in (("baseline", BASE), ("let", LET)):
            settings = {"seed": seed, "let_method": "none" if name == "baseline" else "let"}
            moved = {step: loss + offset for step, loss in valid.items()}
            folder = tmp_path / f"{name}{seed}"
            runs.append(load_run(name, write_run(folder, moved, settings=settings)))
    _, let = compare(runs, "baseline")
    assert let.final_loss is not None and let.speed_up is not None
    assert (let.final_loss.low, let.final_loss.high, let.final_loss.count) == (4.8, 5.8, 2)
    assert let.speed_up.low == pytest.approx(let.speed_up.high)
    assert let.notes == []


def test_run_that_never_reaches_the_baseline(tmp_path: Path) -> None:
    runs = [
        load_run("baseline", write_run(tmp_path / "a", BASE, settings={})),
        load_run(
            "let", write_run(tmp_path / "b", {20: 7.0, 40: 5.1}, settings={"let_method": "let"})
        ),
    ]
    _, let = compare(runs, "baseline")
    assert let.steps_to_target is None and let.speed_up is None and let.num_reached == 0
    assert dict(zip(COLUMNS, table_rows([let])[0], strict=True))[
        "steps to the baseline's loss"
    ] == ("never")


def test_unfinished_ragged_and_empty_runs_are_said_to_be(tmp_path: Path) -> None:
    baseline = write_run(tmp_path / "baseline", BASE, settings={})
    short = write_run(tmp_path / "short", {20: 5.9}, steps=25, settings={"let_method": "let"})
    # A kill in the middle of a line, and a step that was lost and taken again.
    with (short / "metrics.jsonl").open("a") as stream:
        row = {"iteration": 25, "lm_loss": 4.0, "step_seconds": 2.0, "tokens_per_second": 50.0}
        stream.write(json.dumps(row | {"max_memory_bytes": 1}) + '\n{"iteration": 26, "lm_l')
    empty = write_run(tmp_path / "empty", {}, steps=0, settings={"let_method": "let"})
    runs = [load_run(path.name, path) for path in (baseline, short, empty)]
    lines = compare(runs, "baseline")
    assert runs[1].seconds()[25] == 50.0
    assert lines[1].notes == ["short: unfinished, 25 of 40 steps"]
    assert "empty: unfinished, no step was taken" in lines[2].notes
    written = write_comparison(tmp_path / "out", "title", lines, "baseline", {"command": "c"})
    assert all(path.stat().st_size for path in written)


def test_what_differs_besides_the_method_is_flagged(tmp_path: Path) -> None:
    baseline = load_run("baseline", write_run(tmp_path / "a", BASE, settings={}))
    other = {"let_method": "let", "let_weight": 0.3, "lr": 3e-3, "settings": {"clip_grad": 1.0}}
    let = load_run("let", write_run(tmp_path / "b", LET, settings=other))
    assert differences(let, baseline) == [
        "lr is 0.003, the baseline's 0.001",
        "clip_grad is 1.0, the baseline's None",
    ]
    seed = load_run("let", write_run(tmp_path / "c", LET, settings=other | {"seed": 5}))
    assert any("seed is 5" in text for text in differences(seed, baseline))
    unknown = load_run("x", write_run(tmp_path / "d", LET))
    assert differences(unknown, baseline) == [
        "its settings are not known, so neither whether the comparison is fair"
    ]


def test_baseline_is_the_run_without_a_teacher(two: tuple[Path, Path], tmp_path: Path) -> None:
    runs = [load_run(path.name, path) for path in two]
    assert find_baseline(runs, None) == "baseline"
    assert find_baseline(runs, "let") == "let"
    with pytest.raises(LETError, match="--baseline is rkd but the runs are baseline, let"):
        find_baseline(runs, "rkd")
    with pytest.raises(LETError, match="those without a teacher are: none; say which"):
        find_baseline(runs[1:], None)


def test_page_needs_no_other_file(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    # A name that is HTML must not become some.
    runs = [f"base<b>={two[0]}", f"let={two[1]}"]
    assert compare_runs.main([*runs, "--out", str(out), "--title", "a & b"]) == 0
    page = (out / "index.html").read_text()
    assert "base&lt;b&gt;" in page and "a &amp; b" in page and "base<b>" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    names = {"loss_steps", "loss_tokens", "loss_seconds", "loss_memory", "cosine", "weight",
             "downstream"}  # fmt: skip
    assert {path.stem for path in out.glob("*.png")} == names
    assert page.count("data:image/png;base64,") == len(names)
    assert (out / "losses.csv").read_text().count("\n") == 1 + len(BASE) + len(LET)
    assert not list(out.glob("*partial*"))


def test_run_without_metrics_is_refused(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_runs.main([str(two[0]), str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no metrics.jsonl; give a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_notes_name_the_baseline(two: tuple[Path, Path]) -> None:
    lines = compare([load_run(path.name, path) for path in two], "baseline")
    assert notes(lines, "baseline")[0].startswith("Held against baseline:")
