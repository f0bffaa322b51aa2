"""Bad input: each unusable document is reported with its file and line, the rest is kept."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megatron_let.errors import LETError
from megatron_let.preprocessing.readers import zstd
from tests.helpers.text_data import (
    documents_of,
    files_of,
    json_lines,
    run,
    write_input,
)

pytestmark = pytest.mark.medium

GOOD = [b'{"text": "first"}', b'{"text": "last"}']


def rejections(folder: Path) -> list[tuple[str, int, str]]:
    lines = (folder / "out.rejected.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [(Path(r["file"]).name, r["line"], r["reason"]) for r in found]


BAD_LINES = [
    (b'{"text": "cut', "malformed"),
    (b"[1, 2]", "malformed"),
    (b"not json", "malformed"),
    (b"[" * 100_000, "malformed"),
    (b'{"text": ' + b"9" * 5000 + b"}", "malformed"),
    (b'{"body": "x"}', "missing_key"),
    (b'{"text": null}', "missing_key"),
    (b'{"text": 5}', "not_text"),
    (b'{"text": ["x"]}', "not_text"),
    (b'{"text": "\xff\xfe"}', "invalid_utf8"),
    (b'{"text": "\\ud800 half"}', "invalid_utf8"),
    (b'{"text": ""}', "empty"),
    (b"", "blank_line"),
    (b"  \t\r", "blank_line"),
    (b'{"text": "' + b"long " * 60_000 + b'"}', "too_long"),
]


BAD_OPTIONS: dict[str, Any] = {"max_document_bytes": 200_000}


def test_bad_lines_are_reported_and_the_rest_kept(hugging_face: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [part for line, _ in BAD_LINES for part in (GOOD[0], line)]
    source.write_bytes(b"\n".join([*lines, GOOD[1]]) + b"\n")
    report = run([source], tmp_path / "out", hugging_face, **BAD_OPTIONS)
    reasons = [reason for _, reason in BAD_LINES]
    assert rejections(tmp_path) == [
        ("in.jsonl", 2 * index + 2, reason) for index, reason in enumerate(reasons)
    ]
    assert report["documents_in"] == 2 * len(reasons) + 1
    assert report["rejected"] == Counter(reasons)
    assert len(documents_of(tmp_path / "out_text_document")) == len(reasons) + 1


@pytest.mark.parametrize("line", [line for line, _ in BAD_LINES], ids=range(len(BAD_LINES)))
def test_strict_raises_at_a_bad_line(line: bytes, hugging_face: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([GOOD[0], line, GOOD[1]]) + b"\n")
    with pytest.raises(LETError, match=r"in\.jsonl, line 2: .*--strict"):
        run([source], tmp_path / "out", hugging_face, strict=True, **BAD_OPTIONS)


def test_spaces_are_empty_to_sentence_piece(sentence_piece: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", ["   ", "word"])
    report = run([source], tmp_path / "out", sentence_piece)
    assert report["rejected"] == {"empty": 1}


def test_byte_order_mark_and_windows_line_ends_are_read(hugging_face: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(GOOD))
    report = run([source], tmp_path / "out", hugging_face)
    assert (report["documents_in"], report["rejected"]) == (2, {})


def test_line_far_longer_than_a_document_is_rejected(hugging_face: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl.zst"
    source.write_bytes(zstd.compress(GOOD[0] + b"\n" + b"x" * 20_000_000 + b"\n" + GOOD[1]))
    options: dict[str, Any] = {"max_document_bytes": 10_000}
    report = run([source], tmp_path / "out", hugging_face, **options)
    assert rejections(tmp_path) == [("in.jsonl.zst", 2, "too_long")]
    assert report["written"]["documents"] == 2


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("part", [0.3, 0.7, 0.999])
def test_truncated_file_keeps_what_is_readable(
    suffix: str, part: float, hugging_face: Path, tmp_path: Path
) -> None:
    texts = [f"document {i * i * 7919 % 1000003} {i**5 % 99991}" for i in range(1000)]
    data = json_lines(texts)
    whole = gzip.compress(data) if suffix == "gz" else zstd.compress(data)
    source = tmp_path / f"in.jsonl.{suffix}"
    source.write_bytes(whole[: int(len(whole) * part)])
    other = write_input(tmp_path / "other.jsonl", ["after"])
    report = run([source, other], tmp_path / "out", hugging_face)
    assert report["damaged_files"] == {str(source): "the compressed file is cut short"}
    documents = documents_of(tmp_path / "out_text_document")
    rejected = sum(report["rejected"].values())
    assert rejected <= 1 and len(documents) == report["documents_in"] - rejected
    run([write_input(tmp_path / "whole.jsonl", texts)], tmp_path / "whole", hugging_face)
    expected = documents_of(tmp_path / "whole_text_document")
    assert documents[:-1] == expected[: len(documents) - 1]
    assert len(documents) > 1000 * part * 0.5 or suffix == "zst"
    with pytest.raises(LETError, match="cut short"):
        run([source], tmp_path / "strict", hugging_face, strict=True)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_frames_before_damage_are_kept(suffix: str, hugging_face: Path, tmp_path: Path) -> None:
    compress = gzip.compress if suffix == "gz" else zstd.compress
    source = tmp_path / f"in.jsonl.{suffix}"
    frames = compress(GOOD[0] + b"\n") + compress(GOOD[1] + b"\n")
    source.write_bytes(frames)
    assert run([source], tmp_path / "two", hugging_face)["written"]["documents"] == 2
    source.write_bytes(frames + b"garbage at the end")
    report = run([source], tmp_path / "out", hugging_face)
    assert report["written"]["documents"] == 2
    assert "damaged" in report["damaged_files"][str(source)]


def test_damage_is_named_if_nothing_could_be_read(hugging_face: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(json_lines(["not compressed"]))
    with pytest.raises(LETError, match=r"No document was written: .*gz: the file is damaged"):
        run([source], tmp_path / "out", hugging_face)
    write_input(source, ["compressed"])
    assert run([source], tmp_path / "out", hugging_face)["written"]["documents"] == 1


def test_empty_files_are_reported(hugging_face: Path, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.zst", "c.txt"):
        (tmp_path / name).touch()
    good = write_input(tmp_path / "d.jsonl", ["text"])
    sources = [tmp_path / n for n in ("a.jsonl", "b.jsonl.zst", "c.txt")]
    report = run([*sources, good], tmp_path / "out", hugging_face)
    assert report["written"]["documents"] == 1
    assert report["rejected"] == {"empty": 1}
    assert list(report["damaged_files"]) == [str(tmp_path / "b.jsonl.zst")]


def test_bad_parquet_rows_are_reported(hugging_face: Path, tmp_path: Path) -> None:
    values = [b"good", None, b"\xff", b"", b"end"]
    texts = pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "in.parquet", row_group_size=2)
    report = run([tmp_path / "in.parquet"], tmp_path / "out", hugging_face)
    assert rejections(tmp_path) == [
        ("in.parquet", 2, "missing_key"),
        ("in.parquet", 3, "invalid_utf8"),
        ("in.parquet", 4, "empty"),
    ]
    assert report["documents_in"] == 5
    assert len(documents_of(tmp_path / "out_text_document")) == 2


@pytest.mark.parametrize(
    "kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_other_parquet_strings_are_read(kind: Any, hugging_face: Path, tmp_path: Path) -> None:
    table = pyarrow.table({"text": pyarrow.array(["one", "two", "one"]).cast(kind)})
    parquet.write_table(table, tmp_path / "in.parquet")
    report = run([tmp_path / "in.parquet"], tmp_path / "out", hugging_face)
    assert report["written"]["documents"] == 3


def test_damaged_parquet_keeps_its_readable_row_groups(hugging_face: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet", [f"text {i}" for i in range(9)])
    content = bytearray(source.read_bytes())
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(content[:-20])
    content[4:40] = bytes(36)
    source.write_bytes(content)
    report = run([source, cut], tmp_path / "out", hugging_face)
    assert report["documents_in"] == 9
    assert report["rejected"] == {"unreadable": 9 - report["written"]["documents"]}
    assert report["written"]["documents"] == 6
    assert list(report["damaged_files"]) == [str(cut)]


def test_parquet_without_column_is_rejected(hugging_face: Path, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"other": ["a", "b"]}), tmp_path / "in.parquet")
    good = write_input(tmp_path / "good.jsonl", ["text"])
    report = run([tmp_path / "in.parquet", good], tmp_path / "out", hugging_face)
    assert (report["documents_in"], report["rejected"]) == (3, {"missing_key": 2})


def test_missing_subset_is_rejected_only_under_a_filter(hugging_face: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "a", "meta": {"pile_set_name": "Github"}}\n{"text": "b"}\n')
    assert run([source], tmp_path / "all", hugging_face)["written"]["documents"] == 2
    report = run([source], tmp_path / "out", hugging_face, exclude_subsets=("Books3",))
    assert rejections(tmp_path) == [("in.jsonl", 2, "missing_key")]
    assert report["written"]["documents"] == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a disk of 256 kB needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_stops_and_continues(
    hugging_face: Path, tmp_path: Path, small_disk: Path
) -> None:
    texts = [f"number {i} " * 100 for i in range(400)]
    inputs = [write_input(tmp_path / f"{part}.jsonl", texts[part::20]) for part in range(20)]
    run(inputs, tmp_path / "expected" / "out", hugging_face)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(100_000))
    with pytest.raises(LETError, match="is full"):
        run(inputs, small_disk / "out", hugging_face, workers=1)
    done = len(list((small_disk / "out.work").glob("*.json")))
    assert 1 < done < 20
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    run(inputs, small_disk / "out", hugging_face)
    assert files_of(small_disk) == files_of(tmp_path / "expected")


def test_file_size_limit_stops_and_continues(hugging_face: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", [f"number {i} " * 100 for i in range(200)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, before[1]))
        with pytest.raises(LETError, match="is full"):
            run([source], tmp_path / "out", hugging_face)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run([source], tmp_path / "out", hugging_face)["written"]["documents"] == 200
