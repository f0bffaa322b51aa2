"""Data sets of `.ts` files: what is read, how it is scaled and padded, and what is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from megatron_let.errors import LETError
from megatron_let.timeseries import series as module
from megatron_let.timeseries.series import load_data_set, packaged_folder, read_ts
from tests.helpers.time_series import NAME, write_waves

HEADER = "#text\n@problemName X\n@classLabel true a b\n@data\n"


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "X_TRAIN.ts"
    file.write_text(text)
    return file


def write_parts(folder: Path, train: str, test: str) -> None:
    (folder / NAME).mkdir()
    for part, lines in {"TRAIN": train, "TEST": test}.items():
        (folder / NAME / f"{NAME}_{part}.ts").write_text(HEADER + lines)


def test_series_of_different_lengths_are_read(tmp_path: Path) -> None:
    text = "@CLASSLABEL TRUE b a\n\n@Data \n1,2.5,-3e1:0,1,2:b\n# text\n\n4:5: a\r\n"
    series, labels = read_ts(write(tmp_path, text))
    assert labels == ["b", "a"]
    assert series[0].tolist() == [[1, 0], [2.5, 1], [-30, 2]]
    assert series[1].tolist() == [[4, 5]]


@pytest.mark.parametrize(
    "line",
    ["1,2:3,4,5:a", "1,?:3,4:a", "1,nan:3,4:a", "1,2:a", "1,2:3,4:5,6:a", "a", "1,,2:3,4,5:a"],
)
def test_bad_line_is_one_sentence_with_its_number(tmp_path: Path, line: str) -> None:
    file = write(tmp_path, f"{HEADER}1,2:3,4:a\n{line}\n")
    with pytest.raises(LETError) as error:
        read_ts(file)
    assert str(error.value).startswith(f"{file}, line 6: give as many channels")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks @classLabel or @data"),
        (HEADER, "has no series"),
        (HEADER.replace("@classLabel true a b\n", ""), "lacks @classLabel"),
        (HEADER.replace("@data", "") + "1,2:a", "or @data"),
    ],
)
def test_file_of_another_kind_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LETError, match=message):
        read_ts(write(tmp_path, text))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(LETError, match=f"{NAME}_TRAIN.ts does not exist"):
        load_data_set(NAME, tmp_path)


def test_missing_set_is_refused() -> None:
    with pytest.raises(LETError, match=r"Handwriting.*--data.*JapaneseVowels"):
        load_data_set("Handwriting")


@pytest.mark.parametrize("line", ["1,2:a", "1,2:3,4:c"])
def test_test_file_of_another_set_is_refused(tmp_path: Path, line: str) -> None:
    write_parts(tmp_path, "1,2:3,4:a\n3,4:1,2:b", line)
    with pytest.raises(LETError, match="other channels or labels"):
        load_data_set(NAME, tmp_path)


def test_channels_are_standardised_over_valid_training_steps(tmp_path: Path) -> None:
    data = load_data_set(NAME, write_waves(tmp_path))
    values = data.train.values[data.train.mask].double()
    assert values.mean(0).abs().max() < 1e-6
    assert (values.std(0, correction=0) - 1).abs().max() < 1e-6
    raw, _ = read_ts(tmp_path / NAME / f"{NAME}_TRAIN.ts")
    test, _ = read_ts(tmp_path / NAME / f"{NAME}_TEST.ts")
    steps = torch.cat(raw)
    expected = (test[3] - steps.mean(0)) / steps.std(0, correction=0)
    torch.testing.assert_close(data.test.values[3, : len(expected)], expected)


def test_constant_channel_becomes_zero(tmp_path: Path) -> None:
    write_parts(tmp_path, "1,2:7,7:a\n3,4:7,7:b", "1,2:7,7:a")
    assert not load_data_set(NAME, tmp_path).train.values[..., 1].any()


def test_padding_is_zero_and_masked(tmp_path: Path) -> None:
    data = load_data_set(NAME, write_waves(tmp_path))
    assert data.train.values.shape == data.test.values.shape == (12, 11, 3)
    assert data.train.mask.sum(1).tolist() == [6, 7, 8, 9, 10, 11] * 2
    assert not data.train.values[~data.train.mask].any()
    assert data.train.labels.tolist() == [1, 0] * 6 and data.num_classes == 2
    short = data.train.rows(torch.tensor([0, 2]), torch.device("cpu")).trimmed()
    assert short.values.shape == (2, 8, 3)
    assert torch.equal(short.values, data.train.values[[0, 2], :8])


def test_packaged_set_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_LET_CACHE", str(tmp_path / "cache"))
    calls = []

    def download(package: str, folder: Path, alternative: str) -> Path:
        calls.append(package)
        with zipfile.ZipFile(folder / "a.whl", "w") as archive:
            for part in ("TRAIN", "TEST"):
                name = f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts"
                archive.writestr(name, HEADER + "1,2:a\n3:b\n")
            archive.writestr("aeon/__init__.py", "")
        return folder / "a.whl"

    monkeypatch.setattr(module, "download_wheel", download)
    assert load_data_set("JapaneseVowels").train.mask.sum(1).tolist() == [2, 1]
    load_data_set("JapaneseVowels", tmp_path)
    assert calls == [module.PACKAGE]
    assert not list(packaged_folder().rglob("*.py"))
