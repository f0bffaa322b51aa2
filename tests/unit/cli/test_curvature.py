"""`tools/curvature.py` on small models: its table, CSV and plot, and what it refuses."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from megatron_let.cli.curvature import main
from tests.helpers.checkpoints import as_megatron, save_llama

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    return save_llama(tmp_path_factory.mktemp("student") / "llama", vocab_size=256, **sizes)


def arguments(teacher: Path, data: Path, output: Path, *more: object) -> list[str]:
    given = ["--teacher", teacher, "--data-path", data, "--output", output, "--probes", 3]
    return [*map(str, given), "--samples", "1", "--seq-length", "8", *map(str, more)]


def test_checkpoint_and_folder_of_one_model_have_the_same_rows(
    student: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    checkpoint = as_megatron(student, tmp_path / "megatron")
    options = arguments(teacher, data, tmp_path / "out", "--layers", 1, 3, "--starts", 1)
    assert main([str(student), str(checkpoint), *options]) == 0
    with (tmp_path / "out/curvature.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    ours, theirs = rows[:5], rows[5:]
    assert [(row["loss"], row["layer"]) for row in ours] == [
        ("nll", ""), ("alignment", "1"), ("total", "1"), ("alignment", "3"), ("total", "3"),
    ]  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        assert {a["model"], b["model"]} == {str(student), str(checkpoint)}
        for name in ("squared_norm", "squared_norm_low", "eigenvalue"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4)
        assert float(a["squared_norm_low"]) < float(a["squared_norm"])
    assert [row["nonzero_after"] for row in ours] == ["", "0", "", "0", ""]
    assert (tmp_path / "out/curvature.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "4"], "--layers has 4 but the model has 3 layers"),
        (["--layers", "0"], "--layers has 0 but the model has 3 layers"),
        (["--layers", "1", "--probes", "1"], "at least 2 --probes"),
        (["--layers", "1", "--weight", "nan"], "--weight is nan"),
        (["--layers", "1", "--weight", "-1"], "--weight is -1"),
        (["--layers", "1", "--samples", "99999"], "fewer than 99999 windows of 9 tokens"),
    ],
)
def test_bad_request_is_one_sentence(
    options: list[str],
    words: str,
    student: Path,
    teacher: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(student), *arguments(teacher, data, tmp_path), *options]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_output_that_is_a_file_is_refused(
    student: Path, teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([str(student), *arguments(teacher, data, tmp_path / "file", "--layers", 1)]) == 2
    assert "file is a file" in capsys.readouterr().err


def test_token_outside_a_vocabulary_is_refused(
    teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = save_llama(tmp_path / "small", vocab_size=8)
    options = arguments(teacher, data, tmp_path / "out", "--layers", 1)
    assert main([str(small), *options]) == 2
    assert "the smaller vocabulary of model and teacher has 8" in capsys.readouterr().err
