"""Ranges from servers that refuse, stall, cut and lie: each fault has its words, and nothing is read beyond a limit."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from hub_server import Answer, Hub

from engram import Progress, Task
from engram.builders import http_ranges
from engram.builders.http_ranges import MissingError, Piece, Ranges, RemoteError

BYTES = bytes(range(256)) * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()  # the next one is made in this environment
    monkeypatch.setattr(http_ranges, "FIRST_WAIT_S", 0.0)
    (tmp_path / "f.bin").write_bytes(BYTES)
    hub = Hub()
    hub.repositories["a/b"] = tmp_path
    yield hub
    hub.close()


def get(hub: Hub, begin: int = 0, end: int = 1000, ranges: Ranges | None = None) -> Piece:
    ranges = ranges or Ranges(hub.url)
    url = f"{hub.url}/a/b/f.bin"
    return ranges.together({"": lambda: ranges.piece(url, "a/b/f.bin", begin, end)})[""]


def test_a_range_is_those_bytes_and_the_size_of_the_whole(hub: Hub) -> None:
    assert get(hub) == (BYTES[:1000], len(BYTES))
    assert get(hub, 1000, 1 << 40) == (BYTES[1000:], len(BYTES)), "the end of the file is the end"
    assert get(hub, len(BYTES), len(BYTES) + 1) == (b"", len(BYTES)), "416, and the size in it"


def without_ranges(a: Answer) -> bool:
    a.send_file(a.server.owner.repositories["a/b"] / "f.bin", ranges=False)
    return True


def test_a_server_that_knows_no_ranges_is_read_no_further_than_asked(hub: Hub) -> None:
    hub.fault = without_ranges
    assert get(hub, 300, 1000) == (BYTES[300:1000], len(BYTES))
    with (hub.repositories["a/b"] / "f.bin").open("r+b") as file:
        file.truncate(1 << 36)  # 64 GiB
    ranges = Ranges(hub.url)
    assert get(hub, 300, 1000, ranges).size == 1 << 36 and ranges.received <= 1 << 17
    time.sleep(0.2)
    assert hub.sent < 1 << 25, "what the sockets hold, and no more"


def answers(status: int, code: str = "", **headers: str) -> Callable[[Answer], bool]:
    return lambda a: a.status(status, code, **headers) is None


def sends(status: int, headers: dict[str, str], body: bytes = BYTES[:1000]) -> Callable[[Answer], bool]:
    return lambda a: a.send(status, body, headers) is None


def raw(a: Answer, text: bytes) -> bool:
    a.wfile.write(text)
    a.close_connection = True
    return True


def cut(a: Answer) -> bool:
    return raw(a, b"HTTP/1.1 206 x\r\nContent-Length: 1000\r\nContent-Range: bytes 0-999/10240\r\n\r\nabc")


FAULTS: dict[str, tuple[Callable[[Answer], bool], type[RemoteError], str, str]] = {
    "gated": (answers(403, "GatedRepo"), RemoteError, "f.bin is gated", "ask for access on its page, then set"),
    "unknown": (answers(401, "RepoNotFound"), MissingError, "is not on the server", "if it is private, set HF_TOKEN"),
    "closed": (answers(403), RemoteError, "is not open to you: the server answers 403", "set HF_TOKEN"),
    "no token": (answers(401), RemoteError, "is not open to you: the server answers 401", "hf auth login"),
    "revision": (answers(404, "RevisionNotFound"), MissingError, "no such revision", "a branch, a tag or a commit"),
    "entry": (answers(404, "EntryNotFound"), MissingError, "f.bin is not on the server", "check the name"),
    "too many": (answers(429), RemoteError, r"answers 429 \(too many requests\)", "try later"),
    "for long": (answers(429, Retry_After="3600"), RemoteError, "asks for 3,600 s of waiting", "try later"),
    "of the hub": (answers(429, ratelimit='"api";r=0;t=250'), RemoteError, "asks for 250 s of waiting", "HF_TOKEN"),
    "broken": (answers(503), RemoteError, "the server answers 503", "try later"),
    "teapot": (answers(418), RemoteError, "the server answers 418", ""),
    "created": (answers(201), RemoteError, "the server answers 201", ""),
    "no size": (sends(206, {}), RemoteError, "does not say which bytes it sends", ""),
    "star": (sends(206, {"Content-Range": "bytes 0-999/*"}), RemoteError, "does not say which bytes", ""),
    "other bytes": (sends(206, {"Content-Range": "bytes 5-1004/10240"}), RemoteError, "the server sends 'bytes 5-", ""),
    "fewer": (sends(206, {"Content-Range": "bytes 0-9/10240"}, BYTES[:10]), RemoteError, "asked for bytes 0", ""),
    "smaller": (sends(206, {"Content-Range": "bytes 0-999/10"}), RemoteError, "asked for bytes 0 to 999", ""),
    "short": (sends(206, {"Content-Range": "bytes 0-999/10240"}, b"abc"), RemoteError, "the server sent 3", ""),
    "more": (sends(206, {"Content-Range": "bytes 0-999/10240"}, BYTES), RemoteError, "the server sends more", ""),
    "416": (answers(416), RemoteError, "no bytes from 0 on and does not say how many", ""),
    "416 lies": (sends(416, {"Content-Range": "bytes */99"}, b""), RemoteError, "no bytes from 0 on", ""),
    "endless": (lambda a: raw(a, b"HTTP/1.1 200 x\r\n\r\n" + BYTES), RemoteError, "not say how large", ""),
    "packed": (sends(206, {"Content-Encoding": "gzip"}), RemoteError, "compresses what was asked for", ""),
    "nowhere": (answers(302), RemoteError, "redirects to no place", ""),
    "to a file": (answers(302, Location="file:///etc/passwd"), RemoteError, "is no URL of a server's file", ""),
    "no address": (answers(302, Location="http://[1"), RemoteError, "is no URL of a server's file", ""),
    "round": (answers(302, Location="/a/b/f.bin"), RemoteError, "redirects more than 5 times", ""),
    "cut": (cut, RemoteError, "the connection was cut", "check the connection"),
    "no answer": (lambda a: raw(a, b""), RemoteError, "the connection was cut", "check the connection"),
    "no protocol": (lambda a: raw(a, b"SSH-2.0-x\r\n"), RemoteError, "the connection was cut", ""),
    "long headers": (lambda a: raw(a, b"HTTP/1.1 200 x\r\nA: " + b"a" * (1 << 20)), RemoteError, "was cut", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_each_fault_of_a_server_is_named(hub: Hub, case: str) -> None:
    hub.fault, kind, words, hint = FAULTS[case]
    with pytest.raises(RemoteError, match=words) as found:
        get(hub)
    assert type(found.value) is kind and hint in found.value.hint
    again = case in ("too many", "broken", "cut", "no answer", "no protocol", "long headers")
    assert len(hub.log) == (3 if again else 6 if case == "round" else 1)
    assert "secret" not in f"{found.value}{found.value.hint}"


def test_what_passes_is_asked_for_again(hub: Hub) -> None:
    faults = [answers(429, Retry_After="0"), cut]
    hub.fault = lambda a: faults.pop()(a) if faults else False
    assert get(hub).data == BYTES[:1000] and len(hub.log) == 3


def test_the_time_that_a_server_asks_for_is_given(hub: Hub) -> None:
    faults = [answers(429, Retry_After="1")]
    hub.fault = lambda a: faults.pop()(a) if faults else False
    began = time.monotonic()
    assert get(hub).data == BYTES[:1000]
    assert 1 <= time.monotonic() - began < 3


def test_nobody_there(hub: Hub) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ranges = Ranges()
        with pytest.raises(RemoteError, match="no connection to 127.0.0.1: .*refused"):
            url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
            ranges.together({"": lambda: ranges.piece(url, "x", 0, 1)})


def silent(a: Answer) -> bool:
    time.sleep(5)
    a.close_connection = True
    return True


def drip(a: Answer, headers: bytes = b"HTTP/1.1 200 x\r\nA: ", times: int = 50) -> bool:
    a.wfile.write(headers)
    for _ in range(times):
        a.wfile.write(b"a")
        time.sleep(0.1)
    return True


def slow_body(a: Answer) -> bool:
    return drip(a, b"HTTP/1.1 206 x\r\nContent-Length: 1000\r\nContent-Range: bytes 0-999/10240\r\n\r\n")


@pytest.mark.parametrize(
    ("fault", "words"),
    [(silent, "the server is silent for"), (drip, "has sent nothing for"), (slow_body, "fewer than 32,768 bytes")],
)
def test_no_server_keeps_anyone_waiting(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Answer], bool], words: str
) -> None:
    monkeypatch.setattr(http_ranges, "PATIENCE_S", 0.3)
    monkeypatch.setattr(http_ranges, "SILENCE_S", 0.8)
    monkeypatch.setattr(http_ranges, "ATTEMPTS", 1)
    hub.fault = fault
    began = time.monotonic()
    with pytest.raises(RemoteError, match=words):
        get(hub)
    assert time.monotonic() - began < 3.5


def test_the_token_stays_with_the_hub(hub: Hub) -> None:
    hub.fault = lambda a: a.role == "hub" and a.redirect(hub.cdn + "/a/b/f.bin?X-Amz-Signature=1") is None
    assert get(hub).data == BYTES[:1000]
    (_, _, first), (role, path, second) = hub.log
    assert first["authorization"] == "Bearer hf_secret" and first["range"] == second["range"] == "bytes=0-999"
    assert role == "cdn" and "authorization" not in second and path.endswith("Signature=1")
    get(hub, ranges=Ranges())
    assert "authorization" not in hub.log[-2][2], "without a hub there is no token"


def test_the_token_is_not_said_where_it_cannot_be_sent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_sec\N{WHITE STAR}ret")
    with pytest.raises(RemoteError, match="cannot be asked for: Unicode") as found:
        get(hub)
    assert "hf_sec" not in str(found.value) and "HF_TOKEN" in found.value.hint


def test_https_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Response:
        headers = {"location": "http://example.org/x"}

    with pytest.raises(RemoteError, match="from https to http"):
        http_ranges._next(Response(), "x", "https://example.org/x")
    assert http_ranges._next(Response(), "x", "http://example.org/y") == "http://example.org/x"


@pytest.mark.parametrize("url", ["ftp://a/b", "https:///b", "https://user:pass@a/b", "https://a:99999999/b", "a/b"])
def test_what_is_no_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(RemoteError, match="is no URL of a server's file") as found:
        http_ranges.origin_of(url)
    assert "pass@" not in str(found.value)


def test_offline_is_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RemoteError, match="a/b/f.bin is on a server, and HF_HUB_OFFLINE is set"):
        get(hub)
    assert not hub.log


def test_all_answers_together_have_a_limit(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_ranges, "MOST_BYTES", 2500)
    ranges = Ranges(hub.url)
    get(hub, ranges=ranges), get(hub, ranges=ranges)
    with pytest.raises(RemoteError, match="more than 2,500 bytes together"):
        get(hub, ranges=ranges)


def test_a_small_file_is_small(hub: Hub) -> None:
    ranges, url = Ranges(hub.url), f"{hub.url}/a/b/f.bin"
    assert ranges.together({"": lambda: ranges.whole(url, "f", len(BYTES))})[""] == BYTES
    with pytest.raises(RemoteError, match="f has more than 10,239 bytes"):
        ranges.together({"": lambda: ranges.whole(url, "f", len(BYTES) - 1)})
    with (hub.repositories["a/b"] / "f.bin").open("r+b") as file:
        file.truncate(1 << 36)
    with pytest.raises(RemoteError, match="f has more than 99 bytes"):
        ranges.together({"": lambda: ranges.whole(url, "f", 99)})
    assert hub.sent < 1 << 25 and ranges.received < 1 << 18
    hub.fault = sends(206, {"Content-Range": "bytes 0-999/10240"})
    with pytest.raises(RemoteError, match="f: the server answers 206 where all was asked for"):
        ranges.together({"": lambda: ranges.whole(url, "f", 99)})


def test_eight_at_once_and_no_more(hub: Hub) -> None:
    now, most, lock = 0, 0, threading.Lock()

    def job() -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return most

    assert len(Ranges().together({str(i): job for i in range(40)})) == 40
    assert most == 8


def test_the_first_error_ends_all() -> None:
    count = itertools.count()

    def job() -> None:
        if next(count) == 3:
            raise RemoteError("three")
        time.sleep(0.05)

    with pytest.raises(RemoteError, match="three"):
        Ranges().together({str(i): job for i in range(100)})
    time.sleep(0.2)
    assert next(count) < 30


class Told(Progress):
    def __init__(self) -> None:
        self.tasks: list[tuple[str, float | None]] = []
        self.done = 0.0

    def task(self, label: str, total: float | None = None, unit: str = "") -> Task:
        self.tasks.append((label, total))
        told = self

        class Counting(Task):
            def advance(self, amount: float = 1) -> None:
                told.done += amount

        return Counting()


def test_progress_only_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: dict[str, Callable[[], Any]] = {str(i): lambda: time.sleep(0.05) for i in range(40)}
    told = Told()
    Ranges("", told).together(jobs)
    assert not told.tasks
    monkeypatch.setattr(http_ranges, "SHOW_AFTER_S", 0.1)
    Ranges("", told).together(jobs)
    assert told.tasks == [("headers", 40)] and told.done == 40
