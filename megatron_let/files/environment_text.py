"""Real text that every machine has: sources and documents of the Python environment."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SUFFIXES = (".py", ".md", ".rst", ".txt")
_MIN_BYTES, _MAX_BYTES = 1_000, 100_000


def environment_text(budget_bytes: int) -> Iterator[str]:
    """Yield the text of files of the standard library and the installed packages.

    Files are ordered by a hash of their relative path, so that packages are mixed and two machines
    with the same packages get the same text. Skips duplicates, files outside 1 to 100 kB and files
    that are not UTF-8.

    Args:
        budget_bytes: stop once this much text was yielded.
    """
    seen: set[bytes] = set()
    total = 0
    for path in _files():
        if total >= budget_bytes:
            return
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            continue
        seen.add(digest)
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue
        total += len(content)
        yield text


def _files() -> list[Path]:
    roots = {Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))}
    files = {
        str(path.relative_to(root)): path
        for root in sorted(roots)
        for path in root.rglob("*")
        if path.suffix in _SUFFIXES
        and path.is_file()
        and _MIN_BYTES <= path.stat().st_size <= _MAX_BYTES
    }
    return [files[n] for n in sorted(files, key=lambda n: hashlib.sha256(n.encode()).digest())]
