"""Ranges of files on a server, through the client of huggingface_hub: nothing that the server says is trusted.

Bytes, redirects, waits and retries have limits; a body is read no further than it was asked for; the token goes to the
hub alone. huggingface_hub's own readers of safetensors headers hold whatever a server sends: a server that does not
know ranges would send the whole file. Its retries sleep for as long as a server likes.
"""

from __future__ import annotations

import importlib
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

from engram import EngramError, Progress, Task, __version__

MOST_BYTES = 1 << 27  # of all answers together
MOST_REDIRECTS = 5
AT_ONCE = 8
ATTEMPTS = 3
FIRST_WAIT_S = 0.5  # before another attempt, more each time
LONGEST_WAIT_S = 20  # what a server may ask for before the next attempt
PATIENCE_S = 10.0  # to connect, and between two parts of an answer
SILENCE_S = 30.0  # no answer begun and no byte of any: a server that drips headers
SLOWEST = 1 << 15  # bytes a second, PATIENCE_S granted before it counts
SHOW_AFTER_S = 2.0
_AGAIN = (408, 429, 500, 502, 503, 504)
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")

_Result = TypeVar("_Result")


class RemoteError(EngramError):
    """A server that cannot be reached, refuses, or answers otherwise than the protocol says."""


class MissingError(RemoteError):
    """A file or repository that the server does not have, or does not show."""


class Piece(NamedTuple):
    """Bytes of a file, fewer than asked for only where it ends, and its whole `size` as the server states it."""

    data: bytes
    size: int


class _AgainError(RemoteError):
    """A fault that may pass: words, and seconds to wait where the server said them."""

    def __init__(self, words: str, wait: float | None = None) -> None:
        super().__init__(words)
        self.wait = wait


class Ranges:
    """One sitting with a server and those that it redirects to; `requests` and `received` (bytes) count what it took.

    home: the URL of the hub, whose origin alone gets the user's token; "" where there is none.
    """

    def __init__(self, home: str = "", progress: Progress = Progress()) -> None:
        from huggingface_hub import constants, get_session, get_token

        token = get_token() if home and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else None
        self._token = {"authorization": f"Bearer {token}"} if token else {}
        self._plain = {"user-agent": f"engram/{__version__}", "accept-encoding": "identity"}
        self._home = origin_of(home) if home else None
        self._session: Callable[[], Any] = get_session
        self._progress = progress
        self._lock, self._stop, self._alive = threading.Lock(), threading.Event(), 0.0
        self.requests = self.received = 0

    def together(self, jobs: Mapping[str, Callable[[], _Result]], label: str = "headers") -> dict[str, _Result]:
        """The results of all jobs, by name, AT_ONCE of them in flight; the first error ends all.

        The threads are daemons: after Ctrl-C none keeps the process.
        """
        todo, done = list(jobs.items())[::-1], queue.SimpleQueue[tuple[str, Any, BaseException | None]]()
        stop = self._stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                try:
                    name, job = todo.pop()
                except IndexError:
                    return
                try:
                    done.put((name, job(), None))
                except BaseException as wrong:
                    done.put((name, None, wrong))

        began = self._alive = time.monotonic()
        for _ in range(min(AT_ONCE, len(jobs))):
            threading.Thread(target=work, daemon=True).start()
        results: dict[str, _Result] = {}
        task: Task | None = None
        with ExitStack() as stack:
            stack.callback(stop.set)
            while len(results) < len(jobs):
                try:
                    name, result, wrong = done.get(timeout=0.1)
                except queue.Empty:
                    if time.monotonic() - self._alive > SILENCE_S:
                        raise RemoteError(f"the server has sent nothing for {SILENCE_S:.0f} s") from None
                else:
                    if wrong is not None:
                        raise wrong
                    results[name] = result
                    if task is not None:
                        task.advance()
                if task is None and time.monotonic() - began > SHOW_AFTER_S:
                    task = stack.enter_context(self._progress.task(label, len(jobs), "files"))
                    task.advance(len(results))
        return results

    def whole(self, url: str, name: str, most: int) -> bytes:
        """A small file, RemoteError where it has more than `most` bytes. To be called in a job, as `piece`."""
        return self._tried(name, lambda: self._whole(url, name, most))

    def piece(self, url: str, name: str, begin: int, end: int) -> Piece:
        """Bytes `begin` to `end` of a file, or to its own end. `name` stands for the URL in what is refused."""
        return self._tried(name, lambda: self._piece(url, name, begin, end))

    def _tried(self, name: str, attempt: Callable[[], _Result]) -> _Result:
        for number in range(1, ATTEMPTS + 1):
            self._alive = time.monotonic()
            try:
                return attempt()
            except _AgainError as wrong:
                wait = FIRST_WAIT_S * number if wrong.wait is None else wrong.wait
                if number == ATTEMPTS or wait > LONGEST_WAIT_S or self._stop.is_set():
                    asked = "" if wrong.wait is None else f" and asks for {wait:,.0f} s of waiting"
                    hint = "check the connection and the name, or try later; more is allowed with HF_TOKEN set"
                    raise RemoteError(f"{name}: {wrong}{asked}", hint=hint) from None
                self._alive = time.monotonic() + wait
                self._stop.wait(wait)
        raise AssertionError("the last attempt returns or raises")

    def _whole(self, url: str, name: str, most: int) -> bytes:
        with self._answer(url, name, {}) as response:
            if response.status_code != 200:
                raise RemoteError(f"{name}: the server answers {response.status_code} where all was asked for")
            data = self._take(response, name, 0, most + 1, True)
        if len(data) > most:
            raise RemoteError(f"{name} has more than {most:,} bytes, no file of its kind is that large")
        return data

    def _piece(self, url: str, name: str, begin: int, end: int) -> Piece:
        with self._answer(url, name, {"range": f"bytes={begin}-{end - 1}"}) as response:
            size = _size(response, name, begin, end)
            if begin >= size:  # nothing is left, or 416
                return Piece(b"", size)
            count = min(end, size) - begin
            ranged = response.status_code == 206
            data = self._take(response, name, 0 if ranged else begin, count, not ranged)
        if len(data) != count:
            raise RemoteError(f"{name}: asked for {count:,} bytes from {begin:,} on, the server sent {len(data):,}")
        return Piece(data, size)

    @contextmanager
    def _answer(self, url: str, name: str, headers: dict[str, str]) -> Iterator[Any]:
        """The answer that is none of redirects, errors and surprises, its body not yet read."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        client = self._session()
        # of huggingface_hub 1 the client is one of httpx, of 2 one of httpx2: the same names
        httpx = importlib.import_module(type(client).__mro__[-3].__module__.partition(".")[0])
        try:
            with ExitStack() as stack:
                for _ in range(MOST_REDIRECTS + 1):
                    own = self._token if origin_of(url) == self._home else {}
                    stream = client.stream(
                        "GET", url, headers=self._plain | own | headers, follow_redirects=False, timeout=PATIENCE_S
                    )
                    response = stack.enter_context(stream)
                    with self._lock:
                        self.requests += 1
                    self._alive = time.monotonic()
                    if response.status_code not in (301, 302, 303, 307, 308):
                        _check(response, name)
                        yield response
                        return
                    url = _next(response, name, url)
                    self._take(response, name, 0, 1 << 14, True)  # read to its end, the connection serves again
                    stack.close()
            raise RemoteError(f"{name}: the server redirects more than {MOST_REDIRECTS} times")
        except OfflineModeIsEnabled:
            hint = "unset it, or give a path that exists"
            raise RemoteError(f"{name} is on a server, and HF_HUB_OFFLINE is set", hint=hint) from None
        except httpx.TimeoutException:
            raise _AgainError(f"the server is silent for {PATIENCE_S:.0f} s") from None
        except httpx.ConnectError as wrong:
            raise _AgainError(f"no connection to {urlsplit(url).hostname}: {str(wrong)[:200]}") from None
        except (httpx.NetworkError, httpx.RemoteProtocolError):
            raise _AgainError("the connection was cut") from None
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as wrong:  # its words may hold the token
            hint = "check HF_TOKEN, HF_ENDPOINT and the proxy's settings"
            raise RemoteError(f"{name} cannot be asked for: {type(wrong).__name__}", hint=hint) from None

    def _take(self, response: Any, name: str, skip: int, most: int, cut: bool) -> bytes:
        """Up to `most` bytes behind the first `skip`; more is cut off, or an error."""
        out, seen, until = bytearray(), 0, time.monotonic() + PATIENCE_S + (skip + most) / SLOWEST
        for chunk in response.iter_raw():
            out += chunk[max(0, skip - seen) :]
            seen += len(chunk)
            with self._lock:
                self.received += len(chunk)
            self._alive = time.monotonic()
            if self.received > MOST_BYTES:
                raise RemoteError(f"{name}: headers of more than {MOST_BYTES:,} bytes together, that is too much")
            if self._stop.is_set() or self._alive > until:
                raise RemoteError(f"{name}: the server sends fewer than {SLOWEST:,} bytes a second")
            if len(out) >= most and cut:
                return bytes(out[:most])
            if len(out) > most:
                raise RemoteError(f"{name}: asked for {most:,} bytes, the server sends more")
        return bytes(out)


def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port; RemoteError for what is no URL of a file on a server."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc:
            raise ValueError
    except ValueError:
        raise RemoteError(
            f"{url.partition('?')[0].rpartition('@')[2]!r:.200} is no URL of a server's file",
            hint="https://host/path, without user and password",
        ) from None
    return parts.scheme, host, port


def _next(response: Any, name: str, url: str) -> str:
    """Where a redirect leads; never from https to http."""
    try:
        target: str = urljoin(url, place := response.headers.get("location", ""))
    except ValueError:
        target = ""
    if not place or urlsplit(url).scheme == "https" != origin_of(target)[0]:
        raise RemoteError(f"{name}: the server redirects to no place, or from https to http")
    origin_of(target)
    return target


def _check(response: Any, name: str) -> None:
    """Raise what an answer that brings no bytes means. Error bodies are not read."""
    status, code = response.status_code, response.headers.get("x-error-code", "")
    if status in (200, 206):
        if response.headers.get("content-encoding", "identity") != "identity":
            raise RemoteError(f"{name}: the server compresses what was asked for as it is")
        return
    if status == 416:
        return
    if status in _AGAIN:
        raise _AgainError(f"the server answers {status}" + " (too many requests)" * (status == 429), _wait(response))
    token = "set HF_TOKEN or run `hf auth login`"
    if code == "GatedRepo":
        raise RemoteError(
            f"{name} is gated: the server answers {status}", hint=f"ask for access on its page, then {token}"
        )
    if code == "RevisionNotFound":
        raise MissingError(f"{name}: the hub has no such revision", hint="a branch, a tag or a commit of it")
    if status in (404, 410) or code == "RepoNotFound":
        raise MissingError(f"{name} is not on the server", hint=f"check the name; if it is private, {token}")
    if status in (401, 403):
        raise RemoteError(
            f"{name} is not open to you: the server answers {status}", hint=f"{token}, with the right to read it"
        )
    raise RemoteError(f"{name}: the server answers {status}")


def _wait(response: Any) -> float | None:
    """Seconds that the server asks for: Retry-After, or the hub's `ratelimit: "api";r=0;t=55`."""
    plain = re.fullmatch(r"\s*(\d{1,9})\s*", response.headers.get("retry-after", ""))
    limit = re.search(r"\br=0\b.*\bt=(\d{1,9})", response.headers.get("ratelimit", ""))
    found = plain or limit
    return float(found[1]) if found else None


def _size(response: Any, name: str, begin: int, end: int) -> int:
    """The size of the whole file, from an answer that must be about the bytes asked for."""
    said = response.headers.get("content-range", "")
    if response.status_code == 416:
        if found := re.fullmatch(r"bytes \*/(\d{1,19})", said):
            if int(found[1]) <= begin:
                return int(found[1])
        raise RemoteError(f"{name}: the server has no bytes from {begin:,} on and does not say how many there are")
    if response.status_code == 200:
        length = response.headers.get("content-length", "")
        if not re.fullmatch(r"\d{1,19}", length):
            raise RemoteError(f"{name}: the server does not say how large the file is")
        return int(length)
    found = _RANGE.fullmatch(said)
    if found is None:
        raise RemoteError(f"{name}: the server does not say which bytes it sends of how many: {said!r:.80}")
    first, last, size = (int(number) for number in found.groups())
    if first != begin or last != min(end, size) - 1:
        raise RemoteError(f"{name}: asked for bytes {begin:,} to {end - 1:,}, the server sends {said!r:.80}")
    return size
