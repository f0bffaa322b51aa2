"""The command that compares runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_let.cli.compare import main
from tests.helpers.metrics_files import write_run

BASE = {20: 6.0, 40: 5.0}


def test_two_runs_print_losses_by_step_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "baseline", BASE, settings={})
    write_run(
        tmp_path / "let", {20: 5.0, 40: 4.5}, teacher_steps=20, settings={"let_method": "let"}
    )
    runs = [str(tmp_path / "baseline"), f"mine={tmp_path / 'let'}"]
    assert main([*runs, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for text in ("-1.0000", "0.500", "speed-up in steps", "2.00x", "mine reached the baseline's"):
        assert text in printed
    assert (tmp_path / "out" / "index.html").is_file()


def test_runs_of_one_name_that_are_not_seeds_of_one_variant_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {"a": "none", "b": "let"}
    runs = [
        write_run(tmp_path / name / "seed-1", BASE, settings={"let_method": method})
        for name, method in methods.items()
    ]
    out = ["--out", str(tmp_path / "out")]
    assert main([*map(str, runs), *out]) == 2
    assert "both named seed-1, and let_method is none and let" in capsys.readouterr().err
    # A file has the name of its folder.
    assert main([str(runs[0] / "metrics.jsonl"), f"seed-1={runs[0]}", *out]) == 2
    assert "have the seed 1" in capsys.readouterr().err
    assert main([f"{path.parent.name}={path}" for path in runs] + out) == 0


def test_metrics_files_of_one_folder_are_two_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, valid in (("base", BASE), ("let", {20: 5.0, 40: 4.5})):
        metrics = write_run(tmp_path / name, valid) / "metrics.jsonl"
        metrics.rename(tmp_path / f"{name}.jsonl")
    runs = [str(tmp_path / f"{name}.jsonl") for name in ("base", "let")]
    assert main([*runs, "--baseline", "base.jsonl", "--out", str(tmp_path / "out")]) == 0
    assert "let.jsonl reached the baseline's" in capsys.readouterr().out


def test_seed_of_an_older_version_is_compared_with_the_others(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "baseline", BASE, settings={})]
    runs += [
        write_run(tmp_path / f"a/{i}", BASE, settings=s)
        for i, s in enumerate(
            ({"let_method": "let", "let_weight": 0.1}, {"seed": 2, "let_method": "let"}, None)
        )
    ]
    given = [f"{name}={run}" for name, run in zip(("baseline", *["let"] * 3), runs, strict=True)]
    assert main([*given, "--out", str(tmp_path / "out")]) == 0


def test_run_without_metrics_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "baseline", BASE, settings={})
    assert main([str(run), str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
