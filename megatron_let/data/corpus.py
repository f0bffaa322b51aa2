"""A corpus of real text without a hub: JSON lines like the Pile's, and a manifest of hashes."""

from __future__ import annotations

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

import zstandard

from megatron_let.data.environment_text import environment_text
from megatron_let.data.packaged_text import PACKAGES
from megatron_let.errors import LETError
from megatron_let.files.atomic import atomic_file, write_json

ENVIRONMENT = "environment"
SOURCES = (ENVIRONMENT, *PACKAGES)
_MIN_CHARACTERS = 200


def make_corpus(output: Path, sources: list[str], budget_bytes: int) -> dict[str, Any]:
    """Write `SOURCE.jsonl.zst` for each source, and `manifest.json`.

    Args:
        output: folder, created if needed; it must not hold a manifest.
        sources: names in `SOURCES`.
        budget_bytes: approximate upper limit of text per source.

    Returns:
        The manifest.

    Raises:
        LETError: the folder holds a corpus, or a package is not available.
    """
    if (output / "manifest.json").exists():
        raise LETError(f"{output} holds a corpus already; give another --output, or delete it.")
    output.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name in sources:
        with tempfile.TemporaryDirectory() as folder:
            package: dict[str, str] = {}
            if name == ENVIRONMENT:
                texts = environment_text(budget_bytes)
                package["python"] = platform.python_version()
            else:
                package = fetch_package(name, Path(folder))
                texts = PACKAGES[name](Path(folder) / "files")
            entries[name] = {**package, **_write(output, name, texts, budget_bytes)}
    # Their files are the text, so reproducing the corpus takes the same versions.
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    manifest = {"sources": entries, "environment": dict(sorted(installed.items()))}
    write_json(output / "manifest.json", manifest)
    return manifest


def fetch_package(name: str, folder: Path) -> dict[str, str]:
    """Download a Debian package and unpack it into `folder`/files, without installing it.

    Returns:
        The file's name and SHA-256.

    Raises:
        LETError: apt is missing or has no such package.
    """
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


def _write(output: Path, name: str, texts: Iterator[str], budget_bytes: int) -> dict[str, Any]:
    """Write one source without duplicate documents; return its manifest entry."""
    path = output / f"{name}.jsonl.zst"
    seen: set[bytes] = set()
    text_bytes = 0
    with atomic_file(path) as partial, zstandard.open(partial, "wb") as file:
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
