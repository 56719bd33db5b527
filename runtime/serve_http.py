"""One HTTP exchange over ASGI: who may ask, bodies up to a limit, answers to readers that may be slow."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engram.runtime.serve_request import ApiError

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
BODY_SECONDS = 30.0  # a body that takes longer to arrive is given up
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SAFE = {"x-content-type-options": "nosniff", "cache-control": "no-store", "referrer-policy": "no-referrer"}


class Gone(Exception):
    """The client went away, or reads nothing any more."""


@dataclass(frozen=True)
class Door:
    """Who may ask. `hosts` are the names that a request's Host must be one of; None: any."""

    hosts: frozenset[str] | None
    api_key: str | None

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """403 for a name that is not ours (DNS rebinding), and for another site's script."""
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise ApiError(403, "host_not_allowed", f"this server is not {_name(host)[:100]!r}",
                           hint="ask it by the name or address that it is bound to")  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "origin_not_allowed", f"requests of the site {origin[:100]!r} are not answered",
                           hint="there is no cross-origin access")  # fmt: skip

    def check_key(self, headers: Mapping[str, str]) -> None:
        """401 without the key, where there is one; compared in constant time."""
        if self.api_key is None:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
            raise ApiError(401, "invalid_api_key", "the API key is missing or wrong",
                           hint="send it as Authorization: Bearer KEY",
                           headers={"www-authenticate": "Bearer"})  # fmt: skip


def _name(host: str) -> str:
    """A Host header's name without its port."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).strip("[]").lower()


class Exchange:
    """One request and its answer."""

    def __init__(self, scope: Message, receive: Receive, send: Send, send_seconds: float) -> None:
        self.method, self.path = str(scope["method"]), str(scope["path"])
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self.status = 0  # 0: nothing was answered yet
        self._receive, self._raw_send, self._seconds = receive, send, send_seconds

    async def body(self, limit: int) -> bytes:
        """The body; ApiError 413 beyond `limit` bytes, 408 where it does not arrive, Gone where nobody sends it."""
        stated = self.headers.get("content-length", "")
        if stated.isdigit() and int(stated) > limit:
            raise _too_large(limit)
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise _too_large(limit)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, "body_timeout", f"the body did not arrive within {BODY_SECONDS:g} s",
                           headers={"connection": "close"}) from None  # fmt: skip

    async def gone(self) -> None:
        """Returns when the client goes away. Call it after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(self, status: int, content: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        """A whole answer."""
        await self._start(status, {"content-type": kind, "content-length": str(len(content)), **(headers or {})})
        await self._send({"type": "http.response.body", "body": content})

    async def json(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        """A whole answer in JSON."""
        await self.answer(status, _json(content), "application/json", headers)

    async def events(self, *objects: Any) -> None:
        """Objects of a stream of server-sent events; the first call begins it."""
        if not self.status:
            await self._start(200, {"content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no"})
        data = b"".join(b"data: " + _json(one) + b"\n\n" for one in objects)
        if data:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_events(self, done: bool = True) -> None:
        """The end of the stream."""
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n" if done else b""})

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        lines = [(name.encode(), value.encode("latin-1")) for name, value in (_SAFE | dict(headers)).items()]
        await self._send({"type": "http.response.start", "status": status, "headers": lines})

    async def _send(self, message: Message) -> None:
        """Waits for a slow reader as long as a request may take, and no longer."""
        try:
            async with asyncio.timeout(self._seconds):
                await self._raw_send(message)
        except (TimeoutError, OSError):
            raise Gone from None


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "body_too_large", f"the body is larger than {limit:,} bytes", headers={"connection": "close"})
