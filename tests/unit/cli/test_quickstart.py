"""The quickstart's output folder, its text, and what it says of a teacher's cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megatron_let.cli import quickstart
from megatron_let.files.names import METRICS
from megatron_let.planner.sizes import TEACHERS

STAGES = ("_train_teacher", "_given_teacher", "_train_students", "_report")


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace all stages but the text's, which writes its lines and does not tokenize them."""
    for stage in STAGES:
        monkeypatch.setattr(quickstart._Quickstart, stage, lambda self, *_: self.output)
    monkeypatch.setattr(quickstart, "run_subcommand", lambda *_: None)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Paragraph {i} of a text.\n\n" for i in range(6_000)))
    return path


def call(*arguments: str | Path) -> int:
    return quickstart.main([*map(str, arguments)])


@pytest.mark.parametrize("bad", [None, b"\xff\xfe", b"too short"])
def test_refused_text_can_be_replaced_in_the_same_output(
    bad: bytes | None, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if bad is not None:
        (tmp_path / "bad.txt").write_bytes(bad)
    output = tmp_path / "out"
    assert call("--output", output, "--text", tmp_path / "bad.txt") == 2
    assert capsys.readouterr().err.startswith("quickstart: error: The text")
    assert call("--output", output, "--text", text) == 0


def test_options_may_change_until_a_run_begins(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert call("--output", output, "--text", text) == 0
    first = (output / "data" / "train.jsonl").read_text()
    text.write_text(text.read_text().replace("Paragraph", "Another"))
    assert call("--output", output, "--text", text) == 0
    assert (output / "data" / "train.jsonl").read_text() == first, "a stage that is done is kept"
    assert call("--output", output, "--text", text, "--steps", "30") == 0
    assert (output / "data" / "train.jsonl").read_text() != first
    (output / "baseline").mkdir()
    (output / "baseline" / METRICS).write_text("")
    before = (output / quickstart.SIGNATURE).read_text()
    capsys.readouterr()
    assert call("--output", output, "--text", text, "--steps", "40") == 2
    assert "--steps is 30 there and 40 here" in capsys.readouterr().err
    assert (output / quickstart.SIGNATURE).read_text() == before
    assert (output / "data" / "train.jsonl").is_file()


def test_folder_of_other_files_is_refused_and_kept(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--output", tmp_path, "--text", text) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [text.name]


@pytest.mark.parametrize("times", [1, 2])
def test_held_out_text_is_not_trained_on(times: int, tmp_path: Path, text: Path) -> None:
    (tmp_path / "link.txt").symlink_to(text)
    texts = [text, tmp_path / "link.txt"][:times]
    assert call("--output", tmp_path / "out", "--text", *texts) == 0
    valid, train = (
        [json.loads(line)["text"] for line in (tmp_path / f"out/data/{name}.jsonl").open()]
        for name in ("valid", "train")
    )
    assert len(valid) >= 3 and not set("".join(valid).split("\n\n")[:-1]) & set(
        "".join(train).split("\n\n")[:-1]
    ) - {""}


def test_output_that_is_a_file_is_refused(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--output", text, "--text", text) == 2
    assert f"{text} is a file" in capsys.readouterr().err


def test_trained_tokenizer_is_byte_level_and_ends_documents(tmp_path: Path, text: Path) -> None:
    assert call("--output", tmp_path / "out", "--text", text) == 0
    folder = tmp_path / "out" / "tokenizer"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode("naïve 東京 Paragraph").ids
    assert tokenizer.decode(ids) == "naïve 東京 Paragraph"
    end = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    assert tokenizer.token_to_id(end) == 0


@pytest.mark.parametrize(("name", "larger"), [("smollm2-135m", True), (None, False)])
def test_cost_of_a_teacher_larger_than_the_student_is_said(
    name: str | None, larger: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = quickstart._parse(["--output", str(tmp_path)])
    run = quickstart._Quickstart(options, "")
    size = TEACHERS[name] if name else quickstart._size(run.small, 4096)
    run._say_cost(size)
    said = " ".join(capsys.readouterr().out.split())
    assert ("is larger than the student" in said) == larger
    factor = float(said.partition("step has ")[2].split()[0])
    assert factor > 2 if larger else 1 < factor < 1.1
