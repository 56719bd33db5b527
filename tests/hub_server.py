"""A hub and its CDN on two ports of this machine: the protocol that huggingface_hub speaks, and servers that lie."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIGNATURE = "X-Amz-Signature=5ec4e7"
BLOCK = 1 << 16


class Answer(BaseHTTPRequestHandler):
    """One request; `fault(self)` may answer in place of the protocol, and says so by True."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        owner = self.server.owner
        with owner.lock:
            owner.log.append((self.role, self.path, {k.lower(): v for k, v in self.headers.items()}))
        time.sleep(owner.latency)
        try:
            if owner.fault is None or not owner.fault(self):
                self.answer()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    @property
    def role(self) -> str:
        return self.server.role

    def answer(self) -> None:
        owner, path = self.server.owner, unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            folder = owner.repositories.get(found[1])
            if folder is None:  # as the hub: whoever is not known learns nothing
                return self.status(401, "RepoNotFound")
            if found[2] not in ("main", COMMIT):
                return self.status(404, "RevisionNotFound")
            files = [{"rfilename": p.relative_to(folder).as_posix()} for p in folder.rglob("*") if p.is_file()]
            return self.send(200, json.dumps({"id": found[1], "sha": COMMIT, "siblings": files}).encode())
        if self.role == "hub" and (found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)):
            file = owner.repositories[found[1]] / found[3]
            if found[2] != COMMIT or not file.is_file():
                return self.status(404, "EntryNotFound")
            if file.suffix != ".json":
                return self.redirect(f"{owner.cdn}/{found[1]}/{found[3]}?{SIGNATURE}")
            return self.send_file(file)
        found = re.fullmatch(r"/([^/]+/[^/]+)/(.+)", path)
        file = None if found is None else owner.repositories.get(found[1], Path("/none")) / found[2]
        return self.status(404) if file is None or not file.is_file() else self.send_file(file)

    def send_file(self, file: Path, ranges: bool = True) -> None:
        size = file.stat().st_size
        said = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        begin, end = (int(said[1]), min(size, int(said[2]) + 1)) if said and ranges else (0, size)
        if said and ranges and begin >= size:
            return self.send(416, b"", {"Content-Range": f"bytes */{size}"})
        headers = {"Content-Length": str(end - begin)}
        if said and ranges:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        self.head(206 if said and ranges else 200, headers)
        with file.open("rb") as data:
            data.seek(begin)
            while begin < end:
                self.write(data.read(min(BLOCK, end - begin)))
                begin += BLOCK

    def redirect(self, target: str) -> None:
        self.send(302, b"Found", {"Location": target})

    def status(self, number: int, code: str = "", **headers: str) -> None:
        more = {"X-Error-Code": code} if code else {}
        self.send(number, b"{}", {**more, **{name.replace("_", "-"): value for name, value in headers.items()}})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.head(status, {"Content-Length": str(len(body))} | (headers or {}))
        self.write(body)

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def write(self, data: bytes) -> None:
        self.wfile.write(data)
        with self.server.owner.lock:
            self.server.owner.sent += len(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what is tested."""

    def __init__(self, owner: Hub, role: str) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.owner, self.role = owner, role
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Hub:
    """`url` speaks for the hub, `cdn` for where it sends those who want weights; log: role, path, headers."""

    def __init__(self, latency: float = 0.0) -> None:
        self.repositories: dict[str, Path] = {}
        self.latency, self.sent, self.fault = latency, 0, None
        self.fault: Callable[[Answer], bool | None] | None
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.lock = threading.Lock()
        self._servers = [Server(self, "hub"), Server(self, "cdn")]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
