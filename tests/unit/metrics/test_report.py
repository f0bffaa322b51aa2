"""Tables, notes and files of a comparison."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import pytest

from megatron_let.metrics.compare import Variant, compare, load_run
from megatron_let.metrics.report import COLUMNS, notes, step_rows, table_rows, write_comparison
from tests.helpers.metrics_files import write_run

BASE = {20: 6.0, 40: 5.0}
LET = {10: 7.0, 20: 5.0, 40: 4.8}


def variants(folder: Path, let: dict[int, float], name: str = "let") -> list[Variant]:
    """Compare a baseline with a run whose first ten steps have a teacher."""
    settings = {"let_method": "let"}
    runs = [
        load_run("baseline", write_run(folder / "a", BASE, settings={}, downstream=40.0)),
        load_run(
            name, write_run(folder / "b", let, teacher_steps=10, settings=settings, downstream=42.5)
        ),
    ]
    return compare(runs, "baseline")


def test_step_rows_are_evaluations_of_both_runs(tmp_path: Path) -> None:
    baseline, let = (variant.runs[0] for variant in variants(tmp_path, LET | {10: 7.0}))
    baseline.metrics.valid_loss[10] = 7.5
    del let.metrics.valid_loss[40]
    assert step_rows(baseline, let) == [
        ("step", "baseline", "let", "difference", "cosine", "weight"),
        ("10", "7.5000", "7.0000", "-0.5000", "0.500", "0.100"),
        ("20", "6.0000", "5.0000", "-1.0000", "", ""),
    ]


def test_table_shows_never_for_run_above_baseline(tmp_path: Path) -> None:
    cells = dict(zip(COLUMNS, table_rows(variants(tmp_path, {20: 7.0, 40: 5.1}))[1], strict=True))
    assert cells["steps to the baseline's loss"] == "never"
    assert cells["held-out loss"] == "5.1000" and cells["speed-up in steps"] == "never"


def test_seed_that_never_reaches_the_baseline_is_marked_beside_the_speed_up(tmp_path: Path) -> None:
    runs = [
        load_run(name, write_run(tmp_path / f"{name}{seed}", valid, settings=settings))
        for seed, let in ((1, {20: 4.9, 40: 4.5}), (2, {20: 7.0, 40: 5.1}))
        for name, valid, settings in (
            ("baseline", BASE, {"seed": seed}),
            ("let", let, {"seed": seed, "let_method": "let"}),
        )
    ]
    cells = dict(zip(COLUMNS, table_rows(compare(runs, "baseline"))[1], strict=True))
    for column in ("speed-up in steps", "speed-up in time", "steps to the baseline's loss"):
        assert cells[column].endswith(", 1 never")


def test_unfinished_and_diverged_runs_are_not_counted_as_one_another(tmp_path: Path) -> None:
    base = load_run("baseline", write_run(tmp_path / "b", BASE, settings={}))
    lets = [
        load_run("let", write_run(tmp_path / f"let{seed}", valid, steps=steps, settings=
                                  {"seed": seed, "let_method": "let"}))
        for seed, valid, steps in (
            (1, {20: 4.9, 40: 4.5}, 40), (2, {20: 7.0}, 30), (3, {20: 7.0, 40: math.nan}, 40),
        )
    ]  # fmt: skip
    rows = lets[2].metrics.steps
    for row in list(rows)[29:]:
        rows[row]["lm_loss"] = math.nan
    cells = dict(zip(COLUMNS, table_rows(compare([base, *lets], "baseline"))[1], strict=True))
    assert cells["speed-up in steps"].endswith(", 1 never, 1 unfinished")
    assert cells["minus the baseline's"] == "-0.5000, 1 diverged"
    cells = dict(zip(COLUMNS, table_rows(compare([base, lets[1]], "baseline"))[1], strict=True))
    assert cells["speed-up in steps"] == "unfinished"


@pytest.mark.parametrize(
    ("let", "expected"),
    [
        # Ten steps of 4 s, ten of 2 s; the baseline took 80 s.
        (LET, "5.0000 at step 20 of 40 (2.00x), after 60 s of training (1.33x)"),
        ({20: 7.0, 40: 5.1}, "let did not reach the baseline's final held-out loss of 5.0000"),
    ],
    ids=["reached", "never"],
)
def test_notes_of_two_runs_give_speed_up(
    tmp_path: Path, let: dict[int, float], expected: str
) -> None:
    found = notes(variants(tmp_path, let))
    assert "baseline" in found[0] and expected in found[1]


def test_files_are_complete_and_self_contained(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # A name or title that looks like HTML must be escaped.
    compared = variants(tmp_path, LET, "let<b>")
    written = write_comparison(out, "a & b", compared, {"command": "c"})
    assert set(written) == set(out.iterdir()) and all(path.stat().st_size for path in written)
    page = (out / "index.html").read_text()
    assert "let&lt;b&gt;" in page and "a &amp; b" in page and "let<b>" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    names = {"loss_steps", "loss_tokens", "loss_seconds", "loss_memory", "cosine", "weight",
             "downstream"}  # fmt: skip
    assert {path.stem for path in out.glob("*.png")} == names
    assert page.count("data:image/png;base64,") == len(names)
    with (out / "losses.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["valid_loss"] for row in rows] == ["6.0", "5.0", "7.0", "5.0", "4.8"]
    assert [row["let_cosine"] for row in rows] == ["", "", "0.5", "", ""]
    assert {row["command"] for row in rows} == {"c"}


def test_diverged_and_unknown_runs_are_reported(tmp_path: Path) -> None:
    """NaN losses and a file that begins at step 11 leave a page with every run on it."""
    nan, late = {20: 6.0, 40: float("nan")}, {20: 5.5, 40: 4.8}
    runs = [
        load_run("baseline", write_run(tmp_path / "a", BASE, settings={})),
        load_run("diverged", write_run(tmp_path / "b", nan, settings={})),
        load_run("late", write_run(tmp_path / "c", late, settings={})),
    ]
    for step in range(1, 11):
        del runs[2].metrics.steps[step]
    for step in range(30, 41):
        runs[1].metrics.steps[step]["lm_loss"] = float("nan")
    found = compare(runs, "baseline")
    cells = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in table_rows(found)}
    assert cells["diverged"]["held-out loss"] == "diverged"
    assert cells["diverged"]["steps to the baseline's loss"] == "never"
    assert cells["late"]["speed-up in time"] == "–"
    assert cells["late"]["speed-up in steps"] != "–"
    page = (write_comparison(tmp_path / "out", "title", found, {"command": "c"})[0]).read_text()
    assert "diverged at step 30" in page and ">nan" not in page
    # Two runs alone get a sentence of their own.
    assert any("unknown" in note for note in notes(compare([runs[0], runs[2]], "baseline")))
    against = compare([runs[1], runs[2]], "diverged")
    assert table_rows(against)[1][COLUMNS.index("steps to the baseline's loss")] == "–"


def test_runs_without_metrics_can_be_reported(tmp_path: Path) -> None:
    runs = [load_run(name, write_run(tmp_path / name, {}, steps=0)) for name in ("a", "b")]
    written = write_comparison(tmp_path / "out", "title", compare(runs, "a"), {"command": "c"})
    assert {path.name for path in written} == {"index.html", "comparison.csv"}
