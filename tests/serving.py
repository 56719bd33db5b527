"""Servers for tests: the real command in a process, and the application in a thread over slots that can fail."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram import Progress
from engram.quantize.package import open_package
from engram.runtime.serve_explain import Explainer
from engram.runtime.server import App, ServeConfig, bound, listen
from engram.runtime.slots import Feed

ROOT = Path(__file__).resolve().parents[1]


class FakeSlots:
    """A model whose next token is the last one plus 1, around an alphabet; slow, or failing, as told."""

    def __init__(self, tokenizer: Any, count: int = 2, context: int = 100_000, seconds: float = 0.0) -> None:
        self.tokenizer, self.count, self.context, self.seconds = tokenizer, count, context, seconds
        self.special: dict[str, Any] = {}
        self.watch: Any = None
        self.lines: list[list[int]] = [[] for _ in range(count)]
        self.steps: list[list[Feed]] = []
        self.closed = False
        self.fault: Callable[[Sequence[Feed]], None] = lambda feeds: None

    def begin(self) -> list[int]:
        return []

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def stop_ids(self) -> frozenset[int]:
        return frozenset({0})

    def length(self, slot: int) -> int:
        return len(self.lines[slot])

    def reuse(self, slot: int, ids: list[int]) -> list[int]:
        shared = 0
        while shared < min(len(self.lines[slot]), len(ids) - 1) and self.lines[slot][shared] == ids[shared]:
            shared += 1
        self.lines[slot] = ids[:shared]
        return ids[shared:]

    def ask(self, feeds: Sequence[Feed]) -> None:
        pass

    def step(self, feeds: Sequence[Feed]) -> list[Tensor]:
        self.steps.append(list(feeds))
        time.sleep(self.seconds)
        try:
            self.fault(feeds)
        except BaseException:
            for feed in feeds:
                self.lines[feed.slot] = []
            raise
        found = []
        for feed in feeds:
            self.lines[feed.slot] += feed.ids
            logits = torch.zeros(self.tokenizer.get_vocab_size())
            logits[self.next(feed.ids[-1])] = 50.0
            found.append(logits)
        return found

    @staticmethod
    def next(token: int) -> int:
        """Letters, one after another."""
        return 67 + (token + 1 - 67) % 20

    def counters(self) -> dict[str, int]:
        return {"rows_read": 7 * len(self.steps)}

    def close(self) -> None:
        self.closed = True


class Says(Progress):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


class Running:
    """An application in a thread, behind a real socket."""

    def __init__(self, model: Any, package: Path, **settings: Any) -> None:
        self.slots, self.says = model, Says()
        self.config = ServeConfig(package=package, port=0, **settings)
        self._package = open_package(package)
        self.app = App(model, Explainer(self._package, model.tokenizer), "tiny", self.config, self.says)
        self._socket = bound(self.config.host, 0)
        self.port = self._socket.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_until_complete(listen(self.app, self._socket, self._stop, self._hurry))
        self._loop.close()

    def ask_to_stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._loop.call_soon_threadsafe(self._hurry.set)
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._socket.close()
        self._package.close()

    def wait_for(self, what: Callable[[], bool], seconds: float = 10) -> None:
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, "it did not come to pass"
            time.sleep(0.005)


def ask(
    port: int, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
) -> tuple[int, dict[str, str], Any]:
    """Status, headers (lower case) and the body, JSON where it is some."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method or ("GET" if body is None else "POST"), path, data, headers or {})
        response = connection.getresponse()
        content = response.read()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, json.loads(content) if "json" in found["content-type"] else content.decode()
    finally:
        connection.close()


def stream(port: int, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Iterator[Any]:
    """The objects of an event stream, and at last "[DONE]". Closing the iterator hangs up."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, json.dumps({**body, "stream": True}).encode(), headers or {})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        while line := response.readline():
            if line.startswith(b"data: "):
                data = line[6:].strip()
                yield data.decode() if data == b"[DONE]" else json.loads(data)
    finally:
        connection.close()


@contextmanager
def process(package: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`engram serve` as a user starts it: the process and its port. Its stderr is at process.stderr from there on."""
    words = [sys.executable, "-m", "engram.cli.main", "serve", str(package), "--port", "0", *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    child = subprocess.Popen(words, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    try:
        seen = ""
        assert child.stderr is not None
        for line in child.stderr:
            seen += line
            if found := re.search(r"serving .* at http://.*:(\d+)$", line.strip()):
                break
        else:
            raise AssertionError(f"the server did not start:\n{seen}")
        yield child, int(found[1])
    finally:
        if child.poll() is None:
            child.kill()
        child.wait(30)
        if child.stderr:
            child.stderr.close()
