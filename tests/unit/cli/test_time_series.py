"""`time-series`: from `.ts` files to the table, on a student of seconds."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from megatron_let.cli.time_series import main
from megatron_let.metrics.provenance import write_csv
from tests.helpers.time_series import NAME, write_settings, write_waves


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    config = write_settings(tmp_path / "settings.yaml")
    data = write_waves(tmp_path / "data")
    return ["--output", str(tmp_path / "out"), "--config", str(config), "--data", str(data)]


def test_commands_lead_to_the_table(
    tmp_path: Path, arguments: list[str], teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", *arguments, "--student", str(teacher)]
    assert main(["pretrain-teacher", *arguments]) == 0
    assert main(train) == 0
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("seed-*.csv")}
    assert len(files) == 4
    (tmp_path / "out" / NAME / "let" / "seed-2.csv").unlink()
    capsys.readouterr()
    # Continues with the one that is missing.
    assert main(train) == 0
    assert capsys.readouterr().out.count("finished before") == 3
    kept = {file: file.stat().st_mtime_ns for file in files}
    assert sum(kept[file] == files[file] for file in files) == 3

    assert main(["table", "--output", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert NAME in table and "without LET" in table and "difference" in table
    with (tmp_path / "out" / "time_series.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 2 * 2
    assert {row["method"] for row in rows} == {"baseline", "let"}
    assert all(row["processor"] and row["torch"] and row["date"] for row in rows)
    assert all(("teacher=" in row["settings"]) == (row["method"] == "let") for row in rows)
    assert (tmp_path / "out" / "time_series.png").is_file()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["pretrain-teacher", "--sets", "Handwriting"], "data set Handwriting was not found"),
        (["pretrain-teacher", "--data", "nowhere"], "The folder nowhere of --data does not exist"),
        (["train"], "make it with `pretrain-teacher`"),
        (["table"], "has no finished run"),
    ],
)
def test_missing_input_is_one_line(
    tmp_path: Path, command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.rstrip().splitlines()[-1].startswith("time-series: error: ")


@pytest.mark.parametrize("changed", ["student", "data"])
def test_finished_run_of_other_weights_or_data_is_refused(
    changed: str, tmp_path: Path, arguments: list[str], teacher: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    student = Path(shutil.copytree(teacher, tmp_path / "a/model"))
    other = Path(shutil.copytree(teacher, tmp_path / "b/model"))
    assert main(["pretrain-teacher", *arguments]) == 0
    train = ["train", *arguments, "--seeds", "1", "1", "--sets", NAME, NAME, "--student"]
    assert main([*train, str(student)]) == 0
    assert "finished before" not in capsys.readouterr().out
    # The same weights in another folder.
    assert main([*train, str(other)]) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    if changed == "student":
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))
    else:
        file = tmp_path / "data" / NAME / f"{NAME}_TEST.ts"
        file.write_text(file.read_text() + "# A comment.\n")
    assert main([*train, str(other)]) == 2
    assert f"seed-1.csv has another {changed} hash; " in capsys.readouterr().err


def test_finished_runs_of_an_earlier_version_are_kept(
    tmp_path: Path, arguments: list[str], teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their files have no hashes of the student and the data."""
    train = ["train", *arguments, "--student", str(teacher)]
    assert main(["pretrain-teacher", *arguments]) == 0
    assert main([*train, "--seeds", "1"]) == 0
    for file in (tmp_path / "out").rglob("seed-1.csv"):
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        old = [{k: v for k, v in row.items() if not k.endswith("_hash")} for row in rows]
        write_csv(file, old, {})
    capsys.readouterr()
    assert main(train) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert main(["table", "--output", str(tmp_path / "out")]) == 0
    with (tmp_path / "out/time_series.csv").open(newline="") as stream:
        assert {row["data_hash"] == "" for row in csv.DictReader(stream)} == {True, False}


@pytest.mark.parametrize("command", ["pretrain-teacher", "train"])
def test_output_that_is_a_file_is_refused_before_training(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([command, "--output", str(tmp_path / "file")]) == 2
    assert "file is a file" in capsys.readouterr().err


def test_layer_out_of_range_is_one_line(
    tmp_path: Path, arguments: list[str], teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain-teacher", *arguments]) == 0
    write_settings(tmp_path / "settings.yaml", layer=9)
    assert main(["train", *arguments, "--student", str(teacher)]) == 2
    assert "student.layer is 9; " in capsys.readouterr().err
