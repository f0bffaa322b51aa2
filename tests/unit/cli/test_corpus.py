"""The corpus command: real text, each document once, and a reproducible manifest."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_let.cli import corpus
from megatron_let.cli.corpus import main
from megatron_let.preprocessing.readers import zstd
from tests.helpers.text_data import run, save_hugging_face_tokenizer

pytestmark = pytest.mark.medium


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in zstd.decompress(path.read_bytes()).splitlines()]


def test_environment_corpus_is_reproducible_and_can_be_preprocessed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert main(["--output", str(tmp_path / name), "--megabytes", "1"]) == 0
    one, two = (tmp_path / n / "environment.jsonl.zst" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    entry = json.loads((tmp_path / "one/manifest.json").read_text())["sources"]["environment"]
    lines = lines_of(one)
    assert entry["documents"] == len(lines) == len({line["text"] for line in lines})
    assert entry["text_bytes"] == sum(len(line["text"].encode()) for line in lines) >= 1_000_000
    assert entry["file_sha256"] == hashlib.sha256(one.read_bytes()).hexdigest()
    tokenizer = save_hugging_face_tokenizer(tmp_path / "tokenizer")
    report = run([one], tmp_path / "out", tokenizer, include_subsets=("environment",))
    assert report["written"]["documents"] == len(lines)


def test_existing_corpus_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["--output", str(tmp_path)]) == 2
    assert "--output" in capsys.readouterr().err


def test_output_that_is_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["--output", str(tmp_path / "file")]) == 2
    assert "file is a file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["linux-doc-6.12", "perl-doc"])
def test_package_is_unpacked_and_each_document_written_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package made here, in place of a download."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed: it makes the Debian package of this test")
    tree, long = tmp_path / "tree", "A sentence that says something. " * 20
    (tree / "DEBIAN").mkdir(parents=True)
    control = "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    (tree / "DEBIAN" / "control").write_text(control)
    (tree / "usr").mkdir()
    for number in range(2):
        (tree / "usr" / f"{number}.pod").write_text("=head1 C\n\n" + long)
        (tree / "usr" / f"{number}.rst.gz").write_bytes(gzip.compress(long.encode()))
    build = subprocess.run

    def download(command: list[str], **options: Any) -> Any:
        if command[0] != "apt-get":
            return build(command, **options)
        target = str(options["cwd"] / "x.deb")
        return build(["dpkg-deb", "-b", str(tree), target], capture_output=True, check=True)

    monkeypatch.setattr(corpus.subprocess, "run", download)
    arguments = ["--output", str(tmp_path / "out"), "--sources", name, "--megabytes", "1"]
    assert main(arguments) == 0
    [line] = lines_of(tmp_path / "out" / f"{name}.jsonl.zst")
    assert long in line["text"]
    assert line["meta"] == {"pile_set_name": name}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sources"][name]["package"] == "x.deb"


def test_missing_package_or_apt_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = subprocess.CompletedProcess([], 100, b"", b"E: Unable to locate package perl-doc\n")
    monkeypatch.setattr(corpus.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/true")
    arguments = ["--output", str(tmp_path), "--sources", "perl-doc"]
    assert main(arguments) == 2
    assert "Unable to locate package perl-doc" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert main(arguments) == 2
    assert "perl-doc" in capsys.readouterr().err
