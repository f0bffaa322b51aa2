"""Download a teacher from the Hugging Face Hub: `owner/name` or `owner/name@revision`."""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from megatron_let.errors import LETError, first_line
from megatron_let.teacher.cache import exclusive_lock
from megatron_let.teacher.weight_files import WEIGHT_NAMES, weight_files

_PROCESS_START = time.time()
_CONFIG = "config.json"
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)


def parse_hub_id(text: str) -> tuple[str, str] | None:
    """Split `owner/name[@revision]` into the repository's id and the revision (default `main`).

    Returns:
        None if `text` does not have that form.
    """
    repository, _, revision = text.partition("@")
    try:
        validate_repo_id(repository)
    except HFValidationError:
        return None
    return (repository, revision or "main") if "/" in repository else None


@functools.cache
def download_teacher(repository: str, revision: str) -> Path:
    """Return the snapshot folder of a model, downloading what is missing from the local cache.

    One process per node contacts the hub; the others wait for it and read the local cache. Rank 0
    prints the commit, so that a run can be repeated with it.

    Args:
        repository: `owner/name`.
        revision: branch, tag or commit hash.

    Raises:
        LETError: the model cannot be downloaded and the local cache does not hold it.
    """
    name = re.sub(r"[^\w.-]", "--", f"{repository}@{revision}")
    with exclusive_lock(name) as lock:
        # Time of the last request to the hub for this revision.
        asked = float((lock.read().splitlines() or ["0"])[-1])
        folder = _cached(repository, revision) if asked > _PROCESS_START else None
        if folder is None:
            folder = _download(repository, revision)
            lock.truncate(0)
            lock.write(f"{time.time()}\n")
    if os.environ.get("RANK", "0") == "0":
        print(f"LET: the teacher is {repository}@{folder.name}", flush=True)
    return folder


def _download(repository: str, revision: str) -> Path:
    # At level INFO the HTTP client logs every request, with signed URLs.
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)
    try:
        siblings = HfApi().model_info(repository, revision=revision).siblings or []
        files = _needed_files([sibling.rfilename for sibling in siblings])
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except Exception as error:  # huggingface_hub's own types, and those of its HTTP client
        folder = _cached(repository, revision)
        if folder is None or isinstance(error, RevisionNotFoundError):
            problem = _describe(error, repository, revision)
            raise LETError(f"The teacher {repository} {problem}") from error
        return folder


def _needed_files(names: list[str]) -> list[str]:
    """Choose config, tokenizer and one set of weights, as transformers would, from a repository."""
    patterns = [_CONFIG, *_TOKENIZER]
    for name in WEIGHT_NAMES:
        stem, _, suffix = name.rpartition(".")
        if name in names:
            patterns.append(name)
            break
        if f"{name}.index.json" in names:
            patterns += [f"{name}.index.json", f"{stem}-*-of-*.{suffix}"]
            break
    top_level = [name for name in names if "/" not in name]
    return [name for name in top_level if any(fnmatch(name, pattern) for pattern in patterns)]


def _cached(repository: str, revision: str) -> Path | None:
    """Return the snapshot in the local cache if its weights are complete."""
    config = try_to_load_from_cache(repository, _CONFIG, revision=revision)
    if not isinstance(config, str):
        return None
    files = weight_files(Path(config).parent)
    return Path(config).parent if files and all(file.is_file() for file in files) else None


def _describe(error: Exception, repository: str, revision: str) -> str:
    """Return the error text that follows the model's name."""
    hub = constants.ENDPOINT
    if isinstance(error, RevisionNotFoundError):
        return (
            f"has no revision {revision} on {hub}; give a branch, a tag or a full commit hash after"
            " the @."
        )
    if isinstance(error, GatedRepoError):
        return (
            f"is gated; accept its conditions at {hub}/{repository} and set HF_TOKEN to a token of"
            " that account."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"is neither a local path nor a public model on {hub}; check the path or the id, or set"
            " HF_TOKEN to a token that may read it."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"is neither a local path nor in the local cache at revision {revision}, and"
            f" HF_HUB_OFFLINE is set; run 'hf download {repository} --revision {revision}' where"
            " there is a network, or unset HF_HUB_OFFLINE."
        )
    return (
        "is neither a local path nor in the local cache, and cannot be downloaded from"
        f" {hub} ({first_line(error)}); check the network, or give a model folder."
    )
