"""Find the files of `--input`, as paths or as URLs of fsspec, and divide them among tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from megatron_let.errors import LETError
from megatron_let.preprocessing.job import REJECTED
from megatron_let.preprocessing.readers import SUFFIXES, kind_of

FileInfo = Mapping[str, Any]

# Small enough to repeat after a kill, few enough for one job array of Slurm.
_TASK_BYTES = 64 * 1024 * 1024
_MIN_TASKS, _MAX_TASKS = 32, 1000


def find_inputs(patterns: Sequence[str]) -> tuple[dict[str, FileInfo], dict[str, str]]:
    """Find the files of `--input`: files, folders and globs.

    Returns:
        fsspec's information on each input file by its path or URL, once each, in the order of
        `patterns` and sorted within each; and why the other files that match are not read.

    Raises:
        LETError: a pattern matches nothing, or names a file with an unsupported suffix.
    """
    found: dict[str, FileInfo] = {}
    ignored: dict[str, str] = {}
    # Links to a file that is read already would repeat its documents.
    files_read: dict[tuple[int, int], str] = {}
    for pattern in patterns:
        try:
            fs, path = url_to_fs(pattern)
            files = dict(_matches(fs, path))
        except (ImportError, ValueError) as error:
            raise LETError(f"--input {pattern} cannot be opened: {error}.") from error
        if not files:
            raise LETError(f"--input {pattern} matches no file or folder.")
        if path in files and kind_of(path) is None:
            raise LETError(f"--input {pattern} has an unsupported suffix; name it {SUFFIXES}.")
        for name, info in files.items():
            url = name if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(name)
            if reason := _reason_to_ignore(fs, path, name):
                ignored[url] = reason
                continue
            if isinstance(fs, LocalFileSystem):
                status = os.stat(name)
                first = files_read.setdefault((status.st_dev, status.st_ino), url)
                if first != url:
                    ignored[url] = f"the same file as {first}"
                    continue
            found[url] = info
    if not found:
        raise LETError(f"--input {' '.join(patterns)} holds no file with a suffix {SUFFIXES}.")
    return found, {url: reason for url, reason in ignored.items() if url not in found}


def _matches(fs: AbstractFileSystem, path: str) -> Iterator[tuple[str, FileInfo]]:
    """Yield the files that a path or glob names; a path that exists is not a glob."""
    if fs.isfile(path):
        yield path, fs.info(path)
    elif fs.isdir(path):
        yield from sorted(fs.find(path, detail=True).items())
    else:
        for name in sorted(fs.glob(path)):
            yield from _matches(fs, name)


def _reason_to_ignore(fs: AbstractFileSystem, path: str, name: str) -> str | None:
    """Return why a file that `path` matches is not read."""
    if any(part.startswith(".") for part in set(name.split("/")) - set(path.split("/"))):
        return "hidden"
    if name != path and name.endswith(REJECTED):
        return "a list of rejected documents"
    if kind_of(name) is None:
        return "a link to a folder" if fs.isdir(name) else "unknown suffix"
    if name.lower().endswith(".json") and fs.isdir(path):
        return "usually metadata: name it in --input to read it"
    return None


def divide(files: Mapping[str, FileInfo]) -> list[list[str]]:
    """Divide files into runs of similar size, one per task; depends only on the files."""
    # The size of a remote file may be unknown.
    sizes = {url: (info.get("size") or 0) + 1 for url, info in files.items()}
    total = sum(sizes.values())
    count = min(len(files), _MAX_TASKS, max(_MIN_TASKS, total // _TASK_BYTES))
    tasks: dict[int, list[str]] = {}
    before = 0
    for url, size in sizes.items():
        tasks.setdefault((2 * before + size) * count // (2 * total), []).append(url)
        before += size
    return list(tasks.values())


def signature(url: str, info: FileInfo) -> str:
    """Return what changes if a file is replaced: its name, size, and time or the store's tag."""
    tags = ("ETag", "etag", "blob_id", "LastModified", "mtime", "created")
    tag = next((info[tag] for tag in tags if info.get(tag)), None)
    return f"{url.rsplit('/', 1)[-1]} {info.get('size')} {tag}"
