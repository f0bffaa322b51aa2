"""A local server with the endpoints of the Hugging Face Hub that a model download needs."""

from __future__ import annotations

import hashlib
import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit


class HubServer:
    """Serves model repositories on a free port of 127.0.0.1; use it as a context manager.

    Attributes:
        requests: `METHOD path` of each request so far, and `SEND file` for each content sent.
        gated: ids whose files need a licence to be accepted.
        broken: ids for which every request fails with status 500.
        silent: whether to accept requests and never answer.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.gated: set[str] = set()
        self.broken: set[str] = set()
        self.silent = False
        self.closed = threading.Event()
        self._files: dict[str, dict[str, dict[str, bytes]]] = {}
        self._branches: dict[str, dict[str, str]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Return the value for `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, cache: Path, **variables: str) -> dict[str, str]:
        """Return the variables for a process that uses this hub and keeps its caches in `cache`."""
        fixed = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(cache / "huggingface"),
            "HF_HUB_CACHE": str(cache / "huggingface" / "hub"),
            "MEGATRON_LET_CACHE": str(cache / "megatron_let"),
        }
        return fixed | variables

    def commit(self, repository: str, folder: Path, branch: str = "main") -> str:
        """Make the files of `folder` the head of a branch; return the commit hash."""
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        commit = hashlib.sha1(repr([(n, _digest(c)) for n, c in files.items()]).encode())
        self._files.setdefault(repository, {})[commit.hexdigest()] = files
        self._branches.setdefault(repository, {})[branch] = commit.hexdigest()
        return commit.hexdigest()

    def downloads(self) -> list[str]:
        """Return the names of the files whose content was sent, sorted."""
        return sorted(r.removeprefix("SEND ") for r in self.requests if r.startswith("SEND "))

    def find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit hash and the files of a revision."""
        commit = self._branches[repository].get(revision, revision)
        files = self._files[repository].get(commit)
        return None if files is None else (commit, files)

    def has(self, repository: str) -> bool:
        """Return whether the repository exists."""
        return repository in self._branches


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """`/api/models/ID[/revision/R]`, `/api/models/ID/tree/R`, `/ID/resolve/R/FILE`, `/lfs/...`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    @property
    def _hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def _answer(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.split("/")[1:]]
        self._hub.requests.append(f"{self.command} {'/'.join(parts)}")
        if self._hub.silent:
            self._hub.closed.wait()
            return
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._with_repository("/".join(parts[2:4]), parts[4:])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._with_repository("/".join(parts[:2]), parts[2:])
        elif parts[0] == "lfs":
            self._lfs("/".join(parts[1:3]), *parts[3:])
        else:
            self._error(HTTPStatus.NOT_FOUND, "EntryNotFound")

    def _with_repository(self, repository: str, rest: list[str]) -> None:
        if repository in self._hub.broken:
            self._error(HTTPStatus.INTERNAL_SERVER_ERROR, "")
            return
        if not self._hub.has(repository):
            # The hub does not tell a client without a token which repositories exist.
            self._error(HTTPStatus.UNAUTHORIZED, "RepoNotFound")
            return
        found = self._hub.find(repository, rest[1] if rest else "main")
        if found is None:
            self._error(HTTPStatus.NOT_FOUND, "RevisionNotFound")
            return
        commit, files = found
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repository, "modelId": repository, "sha": commit,
                        "siblings": siblings, "tags": []})  # fmt: skip
        elif rest[0] == "tree":
            self._json([
                {"type": "file", "path": name, "size": len(content), "oid": _digest(content)[:40]}
                for name, content in files.items()
            ])  # fmt: skip
        else:
            self._resolve(repository, commit, "/".join(rest[2:]), files)

    def _resolve(self, repository: str, commit: str, name: str, files: dict[str, bytes]) -> None:
        if repository in self._hub.gated:
            self._error(HTTPStatus.UNAUTHORIZED, "GatedRepo")
        elif name not in files:
            self._error(HTTPStatus.NOT_FOUND, "EntryNotFound", {"X-Repo-Commit": commit})
        elif name.endswith((".safetensors", ".bin")):
            # Large files are served by another host.
            content = files[name]
            self._send(HTTPStatus.FOUND, b"", {
                "Location": self._hub.url.replace("127.0.0.1", "localhost")
                + f"/lfs/{repository}/{commit}/{name}",
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{_digest(content)}"',
                "X-Linked-Size": str(len(content)),
            })  # fmt: skip
        else:
            self._content(name, files[name], {"X-Repo-Commit": commit})

    def _lfs(self, repository: str, commit: str, name: str) -> None:
        found = self._hub.find(repository, commit)
        assert found is not None
        self._content(name, found[1][name], {})

    def _content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        if self.command == "GET":
            self._hub.requests.append(f"SEND {name}")
        self._send(HTTPStatus.OK, content, headers | {"ETag": f'"{_digest(content)}"'})

    def _json(self, value: Any) -> None:
        self._send(HTTPStatus.OK, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: HTTPStatus, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, **(headers or {})})

    def _send(self, status: HTTPStatus, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
