"""Input as people have it: odd folders, names, codecs, line ends and fields."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import json
import lzma
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from megatron_let.errors import LETError
from megatron_let.preprocessing.inputs import divide, find_inputs
from megatron_let.preprocessing.job import PreprocessOptions
from megatron_let.preprocessing.readers import zstd
from megatron_let.preprocessing.run import preprocess
from tests.helpers.text_data import documents_of, json_lines, run, write_input

pytestmark = pytest.mark.medium

LINES = b'{"text": "one"}\n{"text": "two"}\n'
LONG_WINDOW = {
    zstd.CompressionParameter.window_log: 28,
    zstd.CompressionParameter.enable_long_distance_matching: 1,
}


def in_pieces(data: bytes) -> bytes:
    """Return a zstd frame without its size, whose window is not cut to the data."""
    compressor = zstd.ZstdCompressor(options=LONG_WINDOW)
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ndjson", LINES),
        ("A.JSONL", LINES),
        ("a.Jsonl.GZ", gzip.compress(LINES)),
        ("a.jsonl.gz", gzip.compress(LINES) + bytes(512)),
        ("a.jsonl.zstd", zstd.compress(LINES)),
        ("a.jsonl.zst", in_pieces(LINES)),
        ("a.jsonl.xz", lzma.compress(LINES)),
        ("a.jsonl.bz2", bz2.compress(LINES) + bz2.compress(b"")),
        ("a.json.gz", gzip.compress(LINES)),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("data[1].jsonl", LINES),
        ("a *?.jsonl", LINES),
        ("a.jsonl", LINES.replace(b"{", b'{"meta": 5, ')),
        ("a.jsonl", LINES.replace(b"{", b'{"meta": ["x"], ')),
        ("a.jsonl", LINES.replace(b"{", b'{"score": NaN, ')),
    ],
    ids=range(16),
)  # fmt: skip
def test_two_documents_are_read(
    name: str, content: bytes, hugging_face: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(content)
    # What a name that is read as a pattern would match.
    write_input(folder / "data1.jsonl", ["another"])
    report = run([folder / name], tmp_path / "out", hugging_face)
    assert report["written"]["documents"] == report["documents_in"] == 2
    assert len(documents_of(tmp_path / "out_text_document")) == 2


def test_long_window_needs_the_larger_limit() -> None:
    """The file of the case above is one that the default refuses."""
    with pytest.raises(zstd.ZstdError):
        zstd.ZstdFile(io.BytesIO(in_pieces(LINES))).read()


def test_hub_cache_links_are_read_by_their_name(hugging_face: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / ".cache" / "blobs", tmp_path / ".cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    (snapshot / "data").mkdir(parents=True)
    for number, content in enumerate((LINES, gzip.compress(LINES))):
        (blobs / f"sha{number}").write_bytes(content)
    (snapshot / "data" / "train.jsonl").symlink_to(blobs / "sha0")
    (snapshot / "data" / "test.jsonl.gz").symlink_to(blobs / "sha1")
    report = run([snapshot], tmp_path / "out", hugging_face)
    assert report["written"]["documents"] == 4
    assert report["ignored_files"] == {}


def test_links_to_one_file_are_read_once_and_named(hugging_face: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "b.jsonl").symlink_to(folder / "a.jsonl")
    (folder / "c.jsonl").hardlink_to(folder / "a.jsonl")
    report = run([folder], tmp_path / "out", hugging_face)
    assert report["written"]["documents"] == 2
    reasons = report["ignored_files"]
    assert {Path(path).name for path in reasons} == {"b.jsonl", "c.jsonl"}
    assert all(reason.endswith("a.jsonl") for reason in reasons.values())


def test_files_that_are_not_read_are_named_with_the_reason(
    hugging_face: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    for name in (".ipynb_checkpoints", "sub"):
        (folder / name).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    write_input(folder / "sub" / "a.jsonl", ["text"])
    for name in (".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", "old.rejected.jsonl"):
        write_input(folder / name, ["copy"])
    for name in (".DS_Store", "README", "info.json"):
        (folder / name).write_text("{}")
    said: list[str] = []
    options = PreprocessOptions(
        (str(folder),), tmp_path / "out", "HuggingFaceTokenizer", hugging_face
    )
    report = preprocess(options, said.append)
    assert report is not None
    assert report["documents_in"] == 1
    assert {str(Path(p).relative_to(folder)) for p in report["ignored_files"]} == {
        ".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", ".DS_Store", "README", "info.json",
        "old.rejected.jsonl", "linked",
    }  # fmt: skip
    lines = [line for line in said if line.startswith("not read")]
    assert any("hidden" in line and "._a.jsonl" in line for line in lines)
    assert any("suffix" in line and "README" in line for line in lines)


def test_glob_skips_hidden_files_unless_it_names_them(tmp_path: Path) -> None:
    for name in ("a.jsonl", ".b.jsonl"):
        write_input(tmp_path / name, ["text"])
    found, ignored = find_inputs([str(tmp_path / "*")])
    assert (list(found), list(ignored.values())) == ([str(tmp_path / "a.jsonl")], ["hidden"])
    found, _ = find_inputs([str(tmp_path / ".b.jsonl")])
    assert list(found) == [str(tmp_path / ".b.jsonl")]


def test_remote_files_give_the_data_of_local_ones(hugging_face: Path, tmp_path: Path) -> None:
    rows = pyarrow.Table.from_pylist([{"text": f"row {i}"} for i in range(5)])
    (tmp_path / "in").mkdir()
    parquet.write_table(rows, tmp_path / "in" / "b.parquet")
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "in"), "/bucket/in", recursive=True)
    try:
        local = run([tmp_path / "in"], tmp_path / "local" / "out", hugging_face)
        for part in ("bucket/in", "bucket/in/*"):
            name = "glob" if part.endswith("*") else "folder"
            options = PreprocessOptions(
                (f"memory://{part}",), tmp_path / name / "out", "HuggingFaceTokenizer", hugging_face
            )
            remote = preprocess(options, lambda line: None)
            assert remote is not None
            assert remote["written"] == local["written"]
            assert all(url.startswith("memory://") for url in remote["files"])
            ours, theirs = (tmp_path / n / "out_text_document.bin" for n in ("local", name))
            assert ours.read_bytes() == theirs.read_bytes()
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("url", ["nosuch://bucket/a.jsonl", "s3://bucket/a.jsonl"])
def test_address_without_its_package_is_a_sentence(url: str) -> None:
    if url.startswith("s3") and importlib.util.find_spec("s3fs"):
        pytest.skip("tests the error without s3fs, which is installed here")
    with pytest.raises(LETError, match=url):
        find_inputs([url])


def test_every_file_counts_its_documents_once(hugging_face: Path, tmp_path: Path) -> None:
    subsets = ("Github", "Books3")
    contents = {
        "a.jsonl": json_lines(["x", "", "y"], subsets) + b'{"text": "cut sho\n\n[1]\n{"text": 1}\n',
        "b.jsonl.gz": gzip.compress(json_lines(["p", "q"], subsets) + b"\xff\n"),
        "c.txt": b"a text",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    report = run(
        [tmp_path / name for name in contents], tmp_path / "out", hugging_face,
        exclude_subsets=("Books3",),
    )  # fmt: skip
    files = {Path(path).name: counts for path, counts in report["files"].items()}
    expected: dict[str, Any] = {
        # Two documents are filtered before their text is looked at.
        "a.jsonl": (7, 2, {"Books3": 1}, {"blank_line": 1, "malformed": 2, "not_text": 1}),
        "b.jsonl.gz": (3, 1, {"Books3": 1}, {"invalid_utf8": 1}),
        "c.txt": (1, 0, {}, {"missing_key": 1}),
    }
    for name, (documents, written, filtered, rejected) in expected.items():
        counts = files[name]
        out = sum(tally["documents"] for tally in counts["outputs"].values())
        assert (counts["documents_in"], out, counts["filtered"], counts["rejected"]) == (
            documents, written, filtered, rejected,
        )  # fmt: skip
        assert documents == out + sum(filtered.values()) + sum(rejected.values())
    listed = [json.loads(line) for line in (tmp_path / "out.rejected.jsonl").open()]
    assert len(listed) == sum(report["rejected"].values())


def test_tasks_cover_the_files_in_order_with_similar_sizes() -> None:
    files = {f"{i:05d}": {"size": 1000 * (1 + i % 7)} for i in range(5000)}
    tasks = divide(files)
    assert [url for task in tasks for url in task] == list(files)
    sizes = [sum(files[url]["size"] for url in task) for task in tasks]
    assert len(tasks) == 32 and max(sizes) - min(sizes) <= 2 * 7000
    large = divide({str(i): {"size": 10**10} for i in range(3000)})
    assert len(large) == 1000 and {len(task) for task in large} == {3}
    assert divide({"a": {"size": None}, "b": {}}) == [["a"], ["b"]]
