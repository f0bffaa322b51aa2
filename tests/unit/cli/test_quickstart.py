"""The quickstart's output folder: its recorded options, and its contents after a rejected call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_let.cli import quickstart
from tests.helpers.text_data import save_hugging_face_tokenizer


def call(*arguments: str | Path) -> int:
    return quickstart.main([*map(str, arguments)])


@pytest.fixture
def teacher_with_tokenizer(teacher: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    save_hugging_face_tokenizer(folder)
    return folder


@pytest.mark.parametrize("text", [None, b"\xff\xfe", b"too short"])
def test_rejected_text_leaves_output_empty(
    text: bytes | None, tmp_path: Path, teacher_with_tokenizer: Path
) -> None:
    if text is not None:
        (tmp_path / "a.txt").write_bytes(text)
    output = tmp_path / "out"
    arguments = ("--teacher", teacher_with_tokenizer, "--output", output)
    assert call(*arguments, "--text", tmp_path / "a.txt") == 2
    assert list(output.iterdir()) == []


def test_teacher_without_tokenizer_is_rejected(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--teacher", teacher, "--output", tmp_path / "out") == 2
    assert str(teacher) in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_output_of_other_options_is_rejected_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signature = tmp_path / quickstart.SIGNATURE
    signature.write_text(json.dumps({"steps": 30, "teacher": None, "text": []}))
    (tmp_path / "data").mkdir()
    assert call("--output", tmp_path) == 2
    assert "--steps is 30 there and 200 here" in capsys.readouterr().err
    assert signature.is_file() and (tmp_path / "data").is_dir()
