"""The corpus command: real text, each document once, and a reproducible manifest."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_let.cli.corpus import main
from megatron_let.data import corpus, packaged_text
from tests.helpers.text_data import run

pytestmark = pytest.mark.medium


def lines_of(path: Path) -> list[dict[str, Any]]:
    with zstandard.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def r_record(strings: list[str | None], form: bytes = b"X\n", kind: int = 16) -> bytes:
    """Return a character vector as in R's lazy-load database, versions and encoding included."""
    record = form + struct.pack(">iiii5s", 3, 0x40201, 0x30500, 5, b"UTF-8")
    record += struct.pack(">ii", kind, len(strings))
    for string in strings:
        encoded = b"" if string is None else string.encode()
        record += struct.pack(">ii", 0x40009, -1 if string is None else len(encoded)) + encoded
    return struct.pack(">I", len(record)) + zlib.compress(record)


def test_environment_corpus_is_reproducible_and_can_be_preprocessed(
    hugging_face: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        assert main(["--output", str(tmp_path / name), "--megabytes", "1"]) == 0
    one, two = (tmp_path / n / "environment.jsonl.zst" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    entry = json.loads((tmp_path / "one/manifest.json").read_text())["sources"]["environment"]
    lines = lines_of(one)
    assert entry["documents"] == len(lines) == len({line["text"] for line in lines})
    assert entry["text_bytes"] == sum(len(line["text"].encode()) for line in lines) >= 1_000_000
    assert entry["file_sha256"] == hashlib.sha256(one.read_bytes()).hexdigest()
    report = run([one], tmp_path / "out", hugging_face, include_subsets=("environment",))
    assert report["written"]["documents"] == len(lines)


def test_existing_corpus_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["--output", str(tmp_path)]) == 2
    assert "--output" in capsys.readouterr().err


def test_html_text_drops_markup_and_keeps_blocks() -> None:
    page = (
        "<html><head><title>no</title><style>p {}</style></head><body><h1>Head</h1>"
        "<p>One &amp;  two</p><script>no()</script><ul><li>a</li><li>b</li></ul></body></html>"
    )
    assert packaged_text.html_text(page) == "Head\n\nOne & two\n\na\n\nb"


def test_r_database_yields_strings_and_rejects_other_records() -> None:
    first, second = ["one", "", "zwölf", None], ["x" * 70_000]
    vectors = list(packaged_text.r_string_vectors(r_record(first) + r_record(second)))
    assert vectors == [["one", "", "zwölf", ""], second]
    for damaged in (r_record(["a"], kind=13), r_record(["a"], form=b"A\n")):
        with pytest.raises(ValueError, match="not a character vector"):
            list(packaged_text.r_string_vectors(damaged))


@pytest.mark.parametrize("name", packaged_text.PACKAGES)
def test_each_package_reader_yields_its_document(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files like those of the packages, without a download."""
    long = "A sentence that says something. " * 20

    def fetch(_: str, folder: Path) -> dict[str, str]:
        files = folder / "files" / "usr"
        files.mkdir(parents=True)
        (files / "a.html").write_text(f"<p>{long}</p>")
        (files / "b.html").write_text(f"<p>{long}</p>")
        (files / "c.pod").write_text("=head1 C\n\n" + long)
        (files / "d.rst.gz").write_bytes(gzip.compress(long.encode()))
        (files / "data").mkdir()
        (files / "data/Rdata.rdb").write_bytes(r_record(["EMMA", "Chapter 1", long, "é"]))
        (files / "e.dict.dz").write_bytes(gzip.compress(f"word\n  {long}\nother\n  x".encode()))
        return {"package": "x.deb", "sha256": "0"}

    monkeypatch.setattr(corpus, "fetch_package", fetch)
    manifest = corpus.make_corpus(tmp_path, [name], 1_000_000)
    [line] = lines_of(tmp_path / f"{name}.jsonl.zst")
    assert "A sentence that says something." in line["text"]
    assert line["meta"] == {"pile_set_name": name}
    assert manifest["sources"][name]["package"] == "x.deb"


def test_missing_package_or_apt_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = subprocess.CompletedProcess([], 100, b"", b"E: Unable to locate package anarchism\n")
    monkeypatch.setattr(corpus.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/true")
    arguments = ["--output", str(tmp_path), "--sources", "anarchism"]
    assert main(arguments) == 2
    assert "Unable to locate package anarchism" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert main(arguments) == 2
    assert "anarchism" in capsys.readouterr().err
