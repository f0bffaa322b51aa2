"""Nothing is dropped silently: each bad document is reported with its file and line."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megatron_let.errors import LETError
from tests.helpers.text_data import (
    documents_of,
    files_of,
    json_lines,
    run,
    save_hugging_face_tokenizer,
    save_sentence_piece,
    write_input,
)

GOOD = [b'{"text": "first"}', b'{"text": "last"}']


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hugging_face_tokenizer(tmp_path_factory.mktemp("tokenizer"))


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


@pytest.mark.parametrize("block_bytes", [1, 64, 1 << 20])
@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[f"{i}" for i in range(len(BAD_LINES))])
def test_bad_line_is_reported_and_the_rest_kept(
    line: bytes, reason: str, block_bytes: int, tokenizer: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([GOOD[0], line, GOOD[1]]) + b"\n")
    options: dict[str, Any] = {"block_bytes": block_bytes, "max_document_bytes": 200_000}
    report = run([source], tmp_path / "out", tokenizer, **options)
    assert rejections(tmp_path) == [("in.jsonl", 2, reason)]
    assert (report["documents_in"], report["rejected"]) == (3, {reason: 1})
    assert len(documents_of(tmp_path / "out_text_document")) == 2
    with pytest.raises(LETError, match=r"in\.jsonl, line 2: .*--strict"):
        run([source], tmp_path / "strict", tokenizer, strict=True, **options)


def test_only_spaces_are_empty_to_sentence_piece(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", ["   ", "word"])
    report = run([source], tmp_path / "out", save_sentence_piece(tmp_path / "tokenizer.model"))
    assert report["rejected"] == {"empty": 1}


def test_byte_order_mark_and_line_ends_of_windows(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(GOOD))
    report = run([source], tmp_path / "out", tokenizer)
    assert (report["documents_in"], report["rejected"]) == (2, {})


def test_line_without_a_newline_longer_than_memory(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl.zst"
    source.write_bytes(zstandard.compress(GOOD[0] + b"\n" + b"x" * 50_000_000 + b"\n" + GOOD[1]))
    options: dict[str, Any] = {"block_bytes": 5_000, "max_document_bytes": 10_000}
    report = run([source], tmp_path / "out", tokenizer, **options)
    assert rejections(tmp_path) == [("in.jsonl.zst", 2, "too_long")]
    assert report["written"]["documents"] == 2


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("part", [0.3, 0.7, 0.999])
def test_truncated_file_keeps_what_is_readable(
    suffix: str, part: float, tokenizer: Path, tmp_path: Path
) -> None:
    texts = [f"document {i * i * 7919 % 1000003} {i**5 % 99991}" for i in range(3000)]
    data = json_lines(texts)
    whole = gzip.compress(data) if suffix == "gz" else zstandard.compress(data)
    source = tmp_path / f"in.jsonl.{suffix}"
    source.write_bytes(whole[: int(len(whole) * part)])
    other = write_input(tmp_path / "other.jsonl", ["after"])
    report = run([source, other], tmp_path / "out", tokenizer)
    assert report["damaged_files"] == {str(source): "the compressed file is cut short"}
    documents = documents_of(tmp_path / "out_text_document")
    rejected = sum(report["rejected"].values())
    assert rejected <= 1 and len(documents) == report["documents_in"] - rejected
    run([write_input(tmp_path / "whole.jsonl", texts)], tmp_path / "whole", tokenizer)
    expected = documents_of(tmp_path / "whole_text_document")
    assert documents[:-1] == expected[: len(documents) - 1]
    assert len(documents) > 3000 * part * 0.5 or suffix == "zst"
    with pytest.raises(LETError, match="cut short"):
        run([source], tmp_path / "strict", tokenizer, strict=True)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_damaged_and_multiple_frames(suffix: str, tokenizer: Path, tmp_path: Path) -> None:
    compress = gzip.compress if suffix == "gz" else zstandard.compress
    source = tmp_path / f"in.jsonl.{suffix}"
    frames = compress(GOOD[0] + b"\n") + compress(GOOD[1] + b"\n")
    source.write_bytes(frames)
    assert run([source], tmp_path / "two", tokenizer)["written"]["documents"] == 2
    source.write_bytes(frames + b"garbage at the end")
    report = run([source], tmp_path / "out", tokenizer)
    assert report["written"]["documents"] == 2
    assert "damaged" in report["damaged_files"][str(source)]


def test_empty_files(tokenizer: Path, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.zst", "c.txt"):
        (tmp_path / name).touch()
    good = write_input(tmp_path / "d.jsonl", ["text"])
    sources = [tmp_path / n for n in ("a.jsonl", "b.jsonl.zst", "c.txt")]
    report = run([*sources, good], tmp_path / "out", tokenizer)
    assert report["written"]["documents"] == 1
    assert report["rejected"] == {"empty": 1}
    assert list(report["damaged_files"]) == [str(tmp_path / "b.jsonl.zst")]


def test_parquet_rows(tokenizer: Path, tmp_path: Path) -> None:
    values = [b"good", None, b"\xff", b"", b"end"]
    texts = pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "in.parquet", row_group_size=2)
    report = run([tmp_path / "in.parquet"], tmp_path / "out", tokenizer, block_bytes=1)
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
def test_parquet_strings_of_other_kinds(kind: Any, tokenizer: Path, tmp_path: Path) -> None:
    table = pyarrow.table({"text": pyarrow.array(["one", "two", "one"]).cast(kind)})
    parquet.write_table(table, tmp_path / "in.parquet")
    report = run([tmp_path / "in.parquet"], tmp_path / "out", tokenizer)
    assert report["written"]["documents"] == 3


def test_damaged_parquet(tokenizer: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet", [f"text {i}" for i in range(9)])
    content = bytearray(source.read_bytes())
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(content[:-20])
    content[4:40] = bytes(36)
    source.write_bytes(content)
    report = run([source, cut], tmp_path / "out", tokenizer)
    assert report["documents_in"] == 9
    assert report["rejected"] == {"unreadable": 9 - report["written"]["documents"]}
    assert report["written"]["documents"] == 6
    assert list(report["damaged_files"]) == [str(cut)]


def test_parquet_without_the_column(tokenizer: Path, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"other": ["a", "b"]}), tmp_path / "in.parquet")
    good = write_input(tmp_path / "good.jsonl", ["text"])
    report = run([tmp_path / "in.parquet", good], tmp_path / "out", tokenizer)
    assert (report["documents_in"], report["rejected"]) == (3, {"missing_key": 2})


def test_missing_subset_is_reported_where_it_decides(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "a", "meta": {"pile_set_name": "Github"}}\n{"text": "b"}\n')
    assert run([source], tmp_path / "all", tokenizer)["written"]["documents"] == 2
    report = run([source], tmp_path / "out", tokenizer, exclude_subsets=("Books3",))
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
        pytest.skip("a disk of 256 kB is mounted, for which the tests must run as root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_stops_and_is_continued(
    tokenizer: Path, tmp_path: Path, small_disk: Path
) -> None:
    source = write_input(tmp_path / "in.jsonl", [f"number {i} " * 100 for i in range(400)])
    run([source], tmp_path / "expected" / "out", tokenizer, block_bytes=20_000)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(200_000))
    with pytest.raises(LETError, match=r"is full .* run the same command again"):
        run([source], small_disk / "out", tokenizer, block_bytes=20_000)
    assert not list((small_disk / "out.work").glob("*.bin.partial"))
    done = len(list((small_disk / "out.work").glob("*.bin")))
    assert done > 0
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    run([source], small_disk / "out", tokenizer, block_bytes=20_000)
    assert files_of(small_disk) == files_of(tmp_path / "expected")


def test_file_size_limit_stops_as_a_full_disk(tokenizer: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", [f"number {i} " * 100 for i in range(200)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, before[1]))
        with pytest.raises(LETError, match="is full"):
            run([source], tmp_path / "out", tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run([source], tmp_path / "out", tokenizer)["written"]["documents"] == 200
