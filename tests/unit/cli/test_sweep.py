"""What the sweep command refuses before it trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_let.cli.sweep import main

SWEEP = "sweep_methods"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "lte=configs/let_1p4b.yaml"], "'lte=configs/let_1p4b.yaml'"),
        (["--recipe", "configs/let_1p4b.yaml"], "NAME=FILE"),
        (["--recipe", "let=nowhere.yaml"], "nowhere.yaml"),
        (["--seeds", "1", "2", "1"], "--seeds is 1 2 1"),
        (["--sbatch", "--jobs", "2"], "--jobs 2"),
        (["--sbatch", "--nproc-per-node", "4"], "--nproc-per-node 4"),
    ],
)
def test_option_without_effect_is_refused(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([SWEEP, "--output", str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_teachers_and_students_of_other_texts_are_refused_before_training(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("DATA", str(tmp_path))
    monkeypatch.setenv("TEACHER", str(teacher))
    argv = ["sweep_crossover", "--output", str(tmp_path / "out"), "--", "--seq-length", "128"]
    assert main(argv) == 2
    assert "seq-length of the teacher-" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_file_as_output_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").touch()
    assert main([SWEEP, "--output", str(tmp_path / "out")]) == 2
    assert "is a file" in capsys.readouterr().err
