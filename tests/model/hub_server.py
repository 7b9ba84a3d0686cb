"""A stand-in for a model hub on 127.0.0.1: the routes that huggingface_hub needs, and a record of what was asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt")


@dataclass
class Hub:
    """Repositories by id; each has revisions (branch or tag) that point to folders. `requests` holds every
    (method, path) in order, `refuse` makes every answer that HTTP status."""

    repositories: dict[str, dict[str, Path]]
    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    refuse: int | None = None

    def weight_requests(self) -> list[str]:
        """Paths of weight files that were asked for, by HEAD or GET, within their repository."""
        return [path.split("/", 4)[-1] for _, path in self.requests if path.endswith(WEIGHTS)]

    def commit(self, name: str, revision: str) -> str | None:
        """The commit of a revision, None if there is none."""
        revisions = self.repositories[name]
        for known, folder in revisions.items():
            commit = hashlib.sha1(f"{name}{folder}".encode()).hexdigest()
            if revision in (known, commit):
                return commit
        return None

    def folder(self, name: str, revision: str) -> Path:
        """The folder of a revision."""
        wanted = self.commit(name, revision)
        return next(path for known, path in self.repositories[name].items() if self.commit(name, known) == wanted)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path))
        if self.hub.refuse:
            return self._send(self.hub.refuse, b"{}")
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name not in self.hub.repositories:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.hub.commit(name, revision)
        if commit is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        folder = self.hub.folder(name, revision)
        if path.startswith("api/"):
            return self._api(name, rest[:1], folder, commit)
        return self._file(folder, "/".join(rest[2:]), commit)

    def _api(self, name: str, kind: list[str], folder: Path, commit: str) -> None:
        files = [(path, path.relative_to(folder).as_posix()) for path in _files(folder)]
        if kind == ["tree"]:
            content: Any = [
                {"type": "file", "path": rel, "size": path.stat().st_size, "oid": _digest(path)} for path, rel in files
            ]
        else:
            content = {"id": name, "modelId": name, "sha": commit, "siblings": [{"rfilename": rel} for _, rel in files]}
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _file(self, folder: Path, rel: str, commit: str) -> None:
        path = folder / rel
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        self._send(200, path.read_bytes(), {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": commit})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serve(**repositories: dict[str, Path]) -> Iterator[Hub]:
    """Serves repositories, given as owner__name=revisions, until left."""
    hub = Hub({key.replace("__", "/"): revisions for key, revisions in repositories.items()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
