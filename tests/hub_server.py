"""A small hub on loopback: what huggingface_hub asks of one, with faults on request.

It serves models from memory, announces no xet storage, and logs every request with the bytes of
body that it sent.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 1000
"""Files of so many bytes are kept as large files (sha256), smaller ones in git (sha1)."""
CHUNK = 1 << 14


@dataclass
class Request:
    """One line of the log. `sent` grows while the body is on its way."""

    method: str
    path: str
    headers: Mapping[str, str]
    sent: int = 0


@dataclass
class Repository:
    """Files by path. `served` replaces a file's bytes but not the hash and size announced;
    `drop_after` breaks the connection once after so many bytes; `listed` are further names."""

    files: dict[str, bytes]
    served: dict[str, bytes] = field(default_factory=dict)
    drop_after: dict[str, int] = field(default_factory=dict)
    listed: list[str] = field(default_factory=list)
    gated: bool = False

    @property
    def commit(self) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for path in sorted(self.files):
            digest.update(f"{path} {object_id(self.files[path])}\n".encode())
        return digest.hexdigest()

    def tree(self) -> list[dict[str, Any]]:
        extra = dict.fromkeys(self.listed, b"x")
        return [entry(path, data) for path, data in {**self.files, **extra}.items()]


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def object_id(data: bytes) -> str:
    """What a hub uses as a file's ETag."""
    return git_sha1(data) if len(data) < LARGE else hashlib.sha256(data).hexdigest()


def entry(path: str, data: bytes) -> dict[str, Any]:
    item: dict[str, Any] = {
        "type": "file", "path": path, "size": len(data), "oid": git_sha1(data),
    }  # fmt: skip
    if len(data) >= LARGE:
        item["lfs"] = {"oid": object_id(data), "size": len(data), "pointerSize": 134}
    return item


class Hub:
    """A running server. `delay` is slept before each chunk of a large file's body."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.log: list[Request] = []
        self.delay = 0.0
        self.status: int | None = None
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Hub:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fetched(self, file: str) -> list[Request]:
        """The requests for a file's body."""
        return [r for r in self.log if r.method == "GET" and r.path.endswith("/" + file)]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Requests are logged in `Hub.log`."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = Request(self.command, path, dict(self.headers.items()))
        self.hub.log.append(request)
        try:
            self._route(request)
        except (BrokenPipeError, ConnectionResetError):  # a client that was killed
            self.close_connection = True

    def _route(self, request: Request) -> None:
        if self.hub.status is not None:
            return self._json(request, {"error": "out of order"}, self.hub.status)
        parts = request.path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._api(request, "/".join(parts[2:4]), parts[4:])
        if len(parts) >= 5 and parts[2] == "resolve":
            return self._file(request, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._json(request, {"error": "no such page"}, 404)

    def _api(self, request: Request, name: str, rest: list[str]) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._json(request, {"error": "Repository not found"}, 404, code="RepoNotFound")
        if rest[:1] == ["tree"]:
            return self._json(request, repository.tree())
        return self._json(request, {"id": name, "sha": repository.commit, "siblings": []})

    def _json(self, request: Request, data: object, status: int = 200, code: str = "") -> None:
        body = json.dumps(data).encode()
        headers = {"Content-Type": "application/json"} | ({"X-Error-Code": code} if code else {})
        self._send(request, body, headers, status)

    def _file(self, request: Request, name: str, revision: str, path: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or path not in repository.files:
            return self._json(request, {"error": "Entry not found"}, 404, code="EntryNotFound")
        if repository.gated:
            return self._json(request, {"error": "gated"}, 403, code="GatedRepo")
        announced = repository.files[path]
        headers = {
            "X-Repo-Commit": repository.commit if revision == "main" else revision,
            "ETag": f'"{object_id(announced)}"',
            "X-Linked-Etag": f'"{object_id(announced)}"',
            "X-Linked-Size": str(len(announced)),
            "Accept-Ranges": "bytes",
        }
        body, status = repository.served.get(path, announced), 200
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, status = body[start:], 206
        drop = repository.drop_after.pop(path, None) if request.method == "GET" else None
        return self._send(request, body, headers, status, drop)

    def _send(
        self,
        request: Request,
        body: bytes,
        headers: Mapping[str, str],
        status: int = 200,
        drop: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if request.method == "HEAD":
            return
        end = len(body) if drop is None else drop
        for start in range(0, end, CHUNK):
            if len(body) >= LARGE:
                time.sleep(self.hub.delay)
            chunk = body[start : min(start + CHUNK, end)]
            self.wfile.write(chunk)
            request.sent += len(chunk)
        if drop is not None:
            self.close_connection = True
