"""The least of the Hugging Face hub's HTTP interface that downloading a model takes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: The one commit that every repository has.
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class TinyHub(ThreadingHTTPServer):
    """Serves folders as model repositories.

    Args:
        repositories: id, such as ``acme/tiny`` → folder.
    """

    def __init__(self, repositories: Mapping[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.requests: list[tuple[str, str]] = []  # (method, path) in the order of arrival

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self, repository: str) -> set[str]:
        """Names of a repository's files whose content was asked for."""
        return {
            p.rsplit("/", 1)[1]
            for method, p in self.requests
            if p.startswith(f"/{repository}/resolve/") and method == "GET"
        }


@contextmanager
def serving(repositories: Mapping[str, Path]) -> Iterator[TinyHub]:
    """A hub on a free port of this machine, for as long as the context lasts."""
    with TinyHub(repositories) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: TinyHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        # The oldest models have no owner in their id.
        length = 1 if parts[0] in self.server.repositories else 2
        repository, rest = "/".join(parts[:length]), parts[length:]
        folder = self.server.repositories.get(repository)
        if folder is None:
            self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif api:
            self._send_json(_listing(repository, folder, rest))
        else:
            self._send_file(folder, rest)

    def _send_file(self, folder: Path, parts: list[str]) -> None:
        file = folder / "/".join(parts[2:])
        if parts[0] != "resolve" or parts[1] not in ("main", COMMIT) or not file.is_file():
            self._send(404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT}
        self._send(200, content, headers, "application/octet-stream")

    def _send_json(self, document: object) -> None:
        self._send(200, json.dumps(document).encode(), {})

    def _send(
        self, status: int, body: bytes, headers: Mapping[str, str], kind: str = "application/json"
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": kind}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent: the requests are kept in the server's list."""


def _listing(repository: str, folder: Path, what: list[str]) -> object:
    files = sorted(p for p in folder.iterdir() if p.is_file())
    if what and what[0] == "tree":
        return [
            {
                "type": "file",
                "path": p.name,
                "size": p.stat().st_size,
                "oid": _oid(p.read_bytes()),
            }
            for p in files
        ]
    siblings = [{"rfilename": p.name} for p in files]
    return {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
