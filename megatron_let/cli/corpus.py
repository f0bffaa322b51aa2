"""Collect real text for experiments without a hub: JSON lines like the Pile's, and a manifest.

The source `environment` is the code and documentation of this Python environment. The others are
Debian documentation packages, which apt downloads and does not install.
"""

import argparse
import gzip
import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_let.cli.common import check_output, run_command
from megatron_let.errors import LETError
from megatron_let.files.atomic import atomic_file, write_json
from megatron_let.files.environment_text import environment_text
from megatron_let.preprocessing.readers import zstd

_ENVIRONMENT = "environment"
# Package -> suffix of its documents, which are plain text.
_PACKAGES = {"linux-doc-6.12": ".rst.gz", "perl-doc": ".pod"}
_MIN_CHARACTERS = 200


def main(argv: list[str] | None = None) -> int:
    """Make the corpus; return the exit code."""
    parser = argparse.ArgumentParser(description=" ".join((__doc__ or "").split()))
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the corpus")
    add(
        "--sources",
        nargs="+",
        choices=(_ENVIRONMENT, *_PACKAGES),
        default=[_ENVIRONMENT],
        help=f"sources to collect (default: {_ENVIRONMENT}, which needs no network)",
    )
    add("--megabytes", type=int, default=50, help="MB of text per source (default: 50)")
    options = parser.parse_args(argv)
    if options.megabytes < 1:
        parser.error(f"--megabytes is {options.megabytes}; give at least 1")
    return run_command("corpus", lambda _: _make(options))


def _make(options: argparse.Namespace) -> int:
    output, budget = options.output, options.megabytes * 1_000_000
    check_output(output)
    if (output / "manifest.json").exists():
        raise LETError(f"{output} holds a corpus already; give another --output, or delete it.")
    output.mkdir(parents=True, exist_ok=True)
    sources = {}
    for name in options.sources:
        with tempfile.TemporaryDirectory() as folder:
            if name == _ENVIRONMENT:
                package, texts = {"python": platform.python_version()}, environment_text(budget)
            else:
                package = _fetch_package(name, Path(folder))
                texts = _documents(Path(folder) / "files", _PACKAGES[name])
            sources[name] = {**package, **_write(output, name, texts, budget)}
        entry = sources[name]
        print(f"{name}: {entry['documents']:,} documents, {entry['text_bytes'] / 1e6:.1f} MB")
    # Their files are the text, so reproducing the corpus takes the same versions.
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    manifest = {"sources": sources, "environment": dict(sorted(installed.items()))}
    write_json(output / "manifest.json", manifest)
    return 0


def _fetch_package(name: str, folder: Path) -> dict[str, str]:
    """Download a Debian package and unpack it into `folder`/files; return its name and hash."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise LETError(
            f"The source {name} is a Debian package and apt is missing; leave this source out."
        )
    found = subprocess.run(["apt-get", "download", name], cwd=folder, capture_output=True)
    files = list(folder.glob("*.deb"))
    if found.returncode or not files:
        reason = found.stderr.decode(errors="replace").strip().splitlines()
        raise LETError(
            f"apt-get download {name} failed ({reason[-1] if reason else 'no reason given'}); run"
            " apt-get update first, or leave this source out."
        )
    subprocess.run(["dpkg-deb", "-x", str(files[0]), str(folder / "files")], check=True)
    return {"package": files[0].name, "sha256": _sha256(files[0])}


def _documents(folder: Path, suffix: str) -> Iterator[str]:
    for path in sorted(folder.rglob(f"*{suffix}")):
        # Symbolic links may point outside the package.
        if path.is_file():
            content = path.read_bytes()
            text = gzip.decompress(content) if suffix.endswith(".gz") else content
            yield text.decode(errors="replace")


def _write(output: Path, name: str, texts: Iterator[str], budget_bytes: int) -> dict[str, Any]:
    """Write one source without duplicate documents; return its manifest entry."""
    path = output / f"{name}.jsonl.zst"
    seen: set[bytes] = set()
    text_bytes = 0
    with atomic_file(path) as partial, zstd.open(partial, "wb") as file:
        for text in texts:
            digest = hashlib.sha256(text.encode()).digest()
            if len(text) < _MIN_CHARACTERS or digest in seen:
                continue
            seen.add(digest)
            # The Pile's keys, so that the same flags filter and blend it.
            line = {"text": text, "meta": {"pile_set_name": name}}
            file.write((json.dumps(line) + "\n").encode())
            text_bytes += len(text.encode())
            if text_bytes >= budget_bytes:
                break
    return {
        "file": path.name,
        "file_sha256": _sha256(path),
        "documents": len(seen),
        "text_bytes": text_bytes,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
