"""What the server refuses, and how: bodies, keys, hosts, sites, paths; and what it counts."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny
from serving import FakeSlots, Running, ask
from tokenizers import Tokenizer

from engram.builders.tokenizer import load_tokenizer
from engram.quantize.package import ExportConfig, export_package
from engram.runtime.server import ServeConfig, ServeError, bound

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    checkpoint = tiny.write_checkpoint(folder)
    export_package(ExportConfig(source=checkpoint, out=folder / "package"))
    return folder / "package"


@pytest.fixture(scope="module")
def tokenizer(package: Path) -> Tokenizer:
    return load_tokenizer(package)


@pytest.fixture
def fake(package: Path, tokenizer: Tokenizer, request: pytest.FixtureRequest) -> Iterator[Running]:
    """Two slots that can be slow or fail; `@pytest.mark.parametrize("fake", [settings], indirect=True)`."""
    settings = dict(getattr(request, "param", {}))
    slots = FakeSlots(tokenizer, seconds=settings.pop("seconds", 0.0), count=settings.pop("count", 2))
    running = Running(slots, package, **settings)
    yield running
    running.close()


def client(port: int, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.mark.parametrize(("path", "body", "field"), [
    (COMPLETE, {"prompt": "x", "n": 2}, "n"), (COMPLETE, {"prompt": "x", "best_of": 3}, "best_of"),
    (COMPLETE, {"prompt": "x", "echo": True}, "echo"), (COMPLETE, {"prompt": ["x", "y"]}, "prompt"),
    (COMPLETE, {"prompt": ""}, "prompt"), (COMPLETE, {"prompt": [70, 10_000]}, "prompt"),
    (COMPLETE, {"prompt": [-1]}, "prompt"), (COMPLETE, {"prompt": [True]}, "prompt"), (COMPLETE, {}, "prompt"),
    (COMPLETE, {"prompt": "x", "max_tokens": 0}, "max_tokens"), (COMPLETE, {"prompt": "x", "seed": 1.5}, "seed"),
    (COMPLETE, {"prompt": "x", "temperature": -1}, "temperature"), (COMPLETE, {"prompt": "x", "top_p": 1.1}, "top_p"),
    (COMPLETE, {"prompt": "x", "temperature": "hot"}, "temperature"), (COMPLETE, {"prompt": "x", "stop": [""]}, "stop"),
    (COMPLETE, {"prompt": "x", "logprobs": 21}, "logprobs"), (COMPLETE, {"prompt": "x", "stream": "yes"}, "stream"),
    (COMPLETE, {"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias"), (CHAT, {"messages": []}, "messages"),
    (COMPLETE, {"prompt": "x", "presence_penalty": 0.5}, "presence_penalty"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}},
     "response_format"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": ["x"]}, "messages[0]"), (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs"),
    (COMPLETE, {"prompt": "x", "stream_options": 3}, "stream_options"),
])  # fmt: skip
def test_what_cannot_be_served_is_refused_by_its_name(
    fake: Running, path: str, body: dict[str, Any], field: str
) -> None:
    status, _, answer = ask(fake.port, path, body)
    assert (status, answer["error"]["type"], answer["error"]["param"]) == (400, "invalid_request_error", field)
    assert field.split("[")[0] in answer["error"]["message"]


@pytest.mark.parametrize("body", [
    b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 200_000, b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "temperature": 1e999}', b"",
    b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
])  # fmt: skip
def test_bodies_that_are_no_request_are_refused(fake: Running, body: bytes) -> None:
    status, _, answer = ask(fake.port, COMPLETE, body, method="POST")
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"


def test_unknown_fields_and_nulls_are_left_alone(fake: Running) -> None:
    body = {"prompt": "x", "max_tokens": 1, "n": 1, "stop": None, "user": "me", "top_k": 4, "future": {"a": 1}}
    assert ask(fake.port, COMPLETE, body)[0] == 200


@pytest.mark.parametrize("fake", [{"largest_body": 1000}], indirect=True)
def test_a_huge_body_is_refused_before_it_is_read(fake: Running) -> None:
    assert ask(fake.port, COMPLETE, b"x" * 1001, method="POST")[0] == 413
    with socket.create_connection(("127.0.0.1", fake.port)) as line:  # says that it is huge, and sends nothing
        line.sendall(f"POST {COMPLETE} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9000000000\r\n\r\n".encode())
        assert line.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", fake.port)) as line:  # does not say how much there is
        line.sendall(f"POST {COMPLETE} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        line.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n3e8\r\n" + b"x" * 1000 + b"\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 413")
    assert ask(fake.port, "/health")[0] == 200


@pytest.mark.parametrize("fake", [{"api_key": "correct horse"}], indirect=True)
def test_the_key_is_asked_for(fake: Running) -> None:
    with client(fake.port, "correct horse") as asking:
        assert asking.models.list().data[0].id == "tiny"
    for key in ("wrong", "correct hors", "correct horse2", "", "é"):
        headers = {"authorization": f"Bearer {key}".encode().decode("latin-1")}
        for path in ("/v1/models", "/metrics", "/v1/engram/figures"):
            assert ask(fake.port, path, headers=headers)[0] == 401
        assert ask(fake.port, COMPLETE, {"prompt": "x"}, headers)[0] == 401
    with client(fake.port, "wrong") as asking, pytest.raises(openai.AuthenticationError, match="API key"):
        asking.models.list()
    assert ask(fake.port, "/")[0] == ask(fake.port, "/health")[0] == 200, "no key is needed to see that it is there"


def test_other_hosts_and_other_sites_are_refused(fake: Running) -> None:
    evil = ("evil.example", f"evil.example:{fake.port}", "127.0.0.1.evil.example", "localhost.evil.example:80", "")
    for host in evil:
        assert ask(fake.port, "/v1/models", headers={"host": host})[0] == 403, host
    for host in ("localhost", f"LOCALHOST:{fake.port}", f"127.0.0.1:{fake.port}", f"[::1]:{fake.port}"):
        assert ask(fake.port, "/v1/models", headers={"host": host})[0] == 200, host
    here = f"127.0.0.1:{fake.port}"
    for origin in ("http://evil.example", "null", "http://localhost:1", "http://127.0.0.1"):
        assert ask(fake.port, COMPLETE, {"prompt": "x"}, {"origin": origin})[0] == 403, origin
    status, headers, _ = ask(fake.port, COMPLETE, {"prompt": "x"}, {"origin": f"http://{here}"})
    assert status == 200 and not [name for name in headers if name.startswith("access-control")]


def test_paths_lead_to_routes_only(fake: Running) -> None:
    for path in ("/etc/passwd", "/../../etc/passwd", "/%2e%2e/pyproject.toml", "//", "/v1/models/../x", "/index.html"):
        status, _, answer = ask(fake.port, path)
        assert (status, answer["error"]["code"]) == (404, "not_found")
    status, headers, _ = ask(fake.port, COMPLETE, method="GET")
    assert (status, headers["allow"]) == (405, "POST")
    assert ask(fake.port, COMPLETE, method="OPTIONS")[0] == 405


def test_metrics_count(fake: Running) -> None:
    ask(fake.port, COMPLETE, {"prompt": [70, 71], "max_tokens": 5})
    ask(fake.port, COMPLETE, {"prompt": "x", "n": 2})
    status, headers, text = ask(fake.port, "/metrics")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    expected = {"prompt_tokens_total": 2, "generated_tokens_total": 5, "steps_total": 5, "rows_read_total": 35,
                'requests_total{status="200"}': 1, 'requests_total{status="400"}': 1, "queue_length": 0, "slots": 2,
                "slots_busy": 0, "time_to_first_token_seconds_count": 1, "inter_token_seconds_count": 4,
                'inter_token_seconds_bucket{le="+Inf"}': 4}  # fmt: skip
    assert {name: float(values[f"engram_{name}"]) for name in expected} == expected
    assert float(values["engram_tokens_per_second"]) > 0


def test_an_open_address_needs_a_key(package: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        with pytest.raises(ServeError, match=f"host {host} is reached from other machines"):
            ServeConfig(package, host=host)
        ServeConfig(package, host=host, api_key="long enough")
    with pytest.raises(ServeError, match="shorter than 8 characters"):
        ServeConfig(package, api_key=" ")
    for host in ("127.0.0.1", "::1", "localhost"):
        ServeConfig(package, host=host)


def test_a_port_that_is_taken_is_an_error(package: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ServeError, match="cannot be listened on"):
        bound("127.0.0.1", other.getsockname()[1])


def test_the_commands_options_are_the_servers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engram.cli import main as cli

    given: list[ServeConfig] = []

    def worker(config: ServeConfig, progress: Any) -> dict[str, float]:
        given.append(config)
        return {"generated_tokens": 12, "rows_read": 3400}

    monkeypatch.setattr("engram.runtime.server.serve", worker)
    monkeypatch.setenv("ENGRAM_API_KEY", "from the environment")
    words = "serve pkg --host 0.0.0.0 --port 9 --slots 3 --queue 5 --context 77 --timeout 8.5 --grace 2 --offload ram"
    for more in (["--table-cache", "1MiB", "--verify", "open", "--engine", "torch"], ["--api-key", "of the option"]):
        with pytest.raises(SystemExit) as leaving:
            cli.main([*words.split(), *more])
        assert not leaving.value.code
    first, second = given
    assert (first.package, first.host, first.port, first.slots, first.queue) == (Path("pkg"), "0.0.0.0", 9, 3, 5)
    assert (first.context, first.timeout, first.grace, first.offload) == (77, 8.5, 2.0, "ram")
    assert (first.table_cache, first.verify, first.engine) == (1 << 20, "open", "torch")
    assert (first.api_key, second.api_key, second.engine) == ("from the environment", "of the option", "auto")
    assert "served 12 tokens, 3,400 rows read" in capsys.readouterr().err
