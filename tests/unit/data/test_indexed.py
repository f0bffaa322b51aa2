"""Indexed data: files that do not belong together, or were cut short, are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_let.data.indexed import open_indexed
from megatron_let.errors import LETError
from tests.helpers.data import write_indexed_data


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write_indexed_data(tmp_path / "data", documents=10)


def test_complete_data_set_opens(prefix: Path) -> None:
    assert len(open_indexed(prefix)) == 10


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.99])
def test_file_cut_short_is_refused_by_name(suffix: str, kept: float, prefix: Path) -> None:
    path = prefix.with_suffix(f".{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(LETError, match=rf"data\.{suffix} "):
        open_indexed(prefix)


def test_index_of_an_earlier_data_set_is_refused(prefix: Path, tmp_path: Path) -> None:
    shutil.copy(f"{write_indexed_data(tmp_path / 'earlier', documents=8)}.idx", f"{prefix}.idx")
    with pytest.raises(LETError, match=r"data\.bin .* bytes"):
        open_indexed(prefix)


def test_other_file_in_place_of_the_index_is_refused(prefix: Path) -> None:
    prefix.with_suffix(".idx").write_text('{"text": "not an index"}\n' * 10)
    with pytest.raises(LETError, match=r"data\.idx "):
        open_indexed(prefix)
