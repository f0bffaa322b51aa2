"""The quickstart's output folder: whose it is, and what a refused call leaves in it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.text_data import save_hugging_face_tokenizer
from tools import quickstart


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["quickstart.sh", *map(str, arguments)])
    return quickstart.main()


@pytest.fixture
def teacher_with_tokenizer(teacher: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    save_hugging_face_tokenizer(folder)
    return folder


@pytest.mark.parametrize("text", [None, b"\xff\xfe", b"too short"])
def test_refused_text_leaves_the_output_to_another_call(
    text: bytes | None,
    tmp_path: Path,
    teacher_with_tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if text is not None:
        (tmp_path / "a.txt").write_bytes(text)
    output = tmp_path / "out"
    arguments = ("--teacher", teacher_with_tokenizer, "--output", output)
    assert call(monkeypatch, *arguments, "--text", tmp_path / "a.txt") == 2
    assert list(output.iterdir()) == []


def test_teacher_without_a_tokenizer_is_one_sentence(
    tmp_path: Path,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, "--teacher", teacher, "--output", tmp_path / "out") == 2
    assert "cannot be read" in " ".join(capsys.readouterr().out.split())
    assert list((tmp_path / "out").iterdir()) == []


def test_output_of_another_quickstart_is_refused_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signature = tmp_path / quickstart.SIGNATURE
    signature.write_text(json.dumps({"steps": 30, "teacher": None, "text": []}))
    (tmp_path / "data").mkdir()
    assert call(monkeypatch, "--output", tmp_path) == 2
    assert "--steps is 30 there and 200 here" in " ".join(capsys.readouterr().out.split())
    assert signature.is_file() and (tmp_path / "data").is_dir()
