"""Download a model from the Hugging Face Hub: `owner/name` or `owner/name@revision`."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_session, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from megatron_let.errors import LETError, first_line
from megatron_let.files.atomic import atomic_file
from megatron_let.teacher.cache import exclusive_lock
from megatron_let.teacher.weight_files import WEIGHT_NAMES, has_all_weights

_PROCESS_START = time.time()
_TIMEOUT_SECONDS = 10.0
_COMMIT = re.compile("[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})/?$")
_CONFIG = ("config.json", "generation_config.json")
# Files of a folder's tokenizer.
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "chat_template*",
)  # fmt: skip
# A folder with none of these has no tokenizer, or an incomplete one.
_VOCABULARY = ("tokenizer.json", "vocab.*", "*.model")


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


def snapshot_id(path: str | Path) -> str | None:
    """Return `owner/name@commit` of a snapshot folder in a Hugging Face cache, else None."""
    match = _SNAPSHOT.search(str(path))
    return f"{match[1]}/{match[2]}@{match[3]}" if match else None


@functools.cache
def resolve_commit(repository: str, revision: str) -> str:
    """Return the commit hash of a revision.

    One process per node asks the hub and the others read its answer from the local cache. If the
    hub does not answer, the commit is the one in the local cache.

    Args:
        repository: `owner/name`.
        revision: branch, tag or commit hash; a commit hash needs no network.

    Raises:
        LETError: the hub has no such revision, or neither it nor the local cache can tell.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    reference = _cache_folder(repository) / "refs" / revision
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_lock(repository))
        except LETError:
            # A read-only cache cannot receive a newer commit.
            if reference.is_file():
                return reference.read_text().strip()
            raise
        if not _is_newer_than_process(reference):
            _update_reference(reference, repository, revision)
        return reference.read_text().strip()


@functools.cache
def download_model(repository: str, revision: str, weights: bool = True) -> Path:
    """Return the snapshot folder of a model, downloading what is missing from the local cache.

    One process per node downloads and the others wait. A commit that is complete in the local cache
    needs neither network nor a writable cache. Rank 0 prints the commit of a model with weights.

    Args:
        repository: `owner/name`.
        revision: branch, tag or commit hash.
        weights: whether to download the weights besides config and tokenizer.

    Raises:
        LETError: the model cannot be downloaded and the local cache does not hold it.
    """
    commit = resolve_commit(repository, revision)
    folder = _cached(repository, commit, weights)
    if folder is None:
        with _lock(repository):
            folder = _cached(repository, commit, weights) or _download(repository, commit, weights)
    if weights and os.environ.get("RANK", "0") == "0":
        print(f"LET: the teacher is {repository}@{commit}", flush=True)
    return folder


def _cache_folder(repository: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def _lock(repository: str) -> contextlib.AbstractContextManager[None]:
    folder = _cache_folder(repository)
    return exclusive_lock(folder.parent / ".locks" / folder.name / "megatron_let.lock", "HF_HOME")


def _is_newer_than_process(file: Path) -> bool:
    return file.is_file() and file.stat().st_mtime > _PROCESS_START


def _update_reference(reference: Path, repository: str, revision: str) -> None:
    """Store the hub's commit of a revision, or mark the stored one as current without network."""
    try:
        commit = _api().model_info(repository, revision=revision, timeout=_TIMEOUT_SECONDS).sha
        reference.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(reference) as partial:
            partial.write_text(str(commit))
    except Exception as error:  # huggingface_hub's own types, and those of its HTTP client
        if isinstance(error, RevisionNotFoundError) or not reference.is_file():
            raise _refusal(error, repository, revision) from error
        os.utime(reference)


def _download(repository: str, commit: str, weights: bool) -> Path:
    try:
        info = _api().model_info(repository, revision=commit, timeout=_TIMEOUT_SECONDS)
        names = [sibling.rfilename for sibling in info.siblings or []]
        files = _needed_files(names, weights)
        return Path(snapshot_download(repository, revision=commit, allow_patterns=files))
    except Exception as error:  # huggingface_hub's own types, and those of its HTTP client
        raise _refusal(error, repository, commit) from error


@functools.cache
def _api() -> HfApi:
    # At level INFO the HTTP client logs every request, with signed URLs.
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)
    # Some requests of huggingface_hub take no timeout and would wait indefinitely.
    get_session().event_hooks["request"].append(_limit_time)
    return HfApi()


def _limit_time(request: Any) -> None:
    limits = request.extensions["timeout"]
    request.extensions["timeout"] = {name: limits[name] or _TIMEOUT_SECONDS for name in limits}


def _needed_files(names: list[str], weights: bool) -> list[str]:
    """Choose config, tokenizer and one set of weights, as transformers would, from a repository."""
    patterns = [*_CONFIG, *TOKENIZER_FILES]
    for name in WEIGHT_NAMES if weights else ():
        stem, _, suffix = name.rpartition(".")
        if name in names:
            patterns.append(name)
            break
        if f"{name}.index.json" in names:
            patterns += [f"{name}.index.json", f"{stem}-*-of-*.{suffix}"]
            break
    top_level = [name for name in names if "/" not in name]
    return [name for name in top_level if any(fnmatch(name, pattern) for pattern in patterns)]


def _cached(repository: str, commit: str, weights: bool) -> Path | None:
    """Return the snapshot in the local cache if its files are complete."""
    try:
        folder = Path(
            snapshot_download(
                repository,
                revision=commit,
                local_files_only=True,
                allow_patterns=[*_CONFIG, *TOKENIZER_FILES],
                ignore_patterns="*/*",
            )
        )
    except LocalEntryNotFoundError:
        return None
    names = [file.name for file in folder.iterdir() if file.is_file()]
    has_tokenizer = any(fnmatch(name, pattern) for name in names for pattern in _VOCABULARY)
    complete = _CONFIG[0] in names and has_tokenizer and (not weights or has_all_weights(folder))
    return folder if complete else None


def _refusal(error: Exception, repository: str, revision: str) -> LETError:
    return LETError(f"The model {repository} {_describe(error, repository, revision)}")


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
