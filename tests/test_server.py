"""`engram serve` over real sockets: the official client, several users, and what must not disturb them."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny
from serving import FakeSlots, Running, ask, process, stream
from tokenizers import Tokenizer

from engram.builders.tokenizer import load_tokenizer
from engram.quantize.package import ExportConfig, export_package
from engram.runtime.engine import Model
from engram.runtime.generate import RunConfig, run
from engram.runtime.slots import Feed
from engram.runtime.slots_torch import TorchSlots

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
PROMPTS = ["The memory of a model", "A table has rows, and the rows", "numbers. The", "disk by their", "is a table. A",
           "read from the disk by their numbers. The memory of a model"]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }} {% endfor %}[assistant]"
)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    checkpoint = tiny.write_checkpoint(folder)
    export_package(ExportConfig(source=checkpoint, out=folder / "package"))
    return folder / "package"


@pytest.fixture(scope="module")
def tokenizer(package: Path) -> Tokenizer:
    return load_tokenizer(package)


@pytest.fixture(scope="module")
def real(package: Path) -> Iterator[Running]:
    """The real model behind a real socket, four slots."""
    running = Running(TorchSlots(Model.open(package), 4), package, slots=4)
    yield running
    running.close()


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


def alone(package: Path, prompt: str, count: int) -> str:
    """What `engram run` writes."""
    return str(run(RunConfig(package, prompt=prompt, max_tokens=count), lambda text: None)["text"])


def test_the_official_client_gets_what_run_writes(real: Running, package: Path) -> None:
    expected = alone(package, PROMPTS[0], 24)
    with client(real.port) as asking:
        assert [model.id for model in asking.models.list()] == ["tiny"]
        assert asking.models.retrieve("tiny").owned_by == "engram"
        whole = asking.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=24, temperature=0)
        parts = list(
            asking.completions.create(
                model="tiny", prompt=PROMPTS[0], max_tokens=24, temperature=0, stream=True,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
    assert whole.choices[0].text == expected != ""
    assert "".join(part.choices[0].text for part in parts if part.choices) == expected
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "length"
    assert parts[-1].usage is not None and whole.usage is not None
    ids = len(real.slots.encode(PROMPTS[0]))
    for usage in (parts[-1].usage, whole.usage):
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (ids, 24, ids + 24)
    assert parts[-1].usage.prompt_tokens_details.cached_tokens == ids - 1, "the second one finds the first one's prefix"


def test_the_official_client_chats(package: Path, tokenizer: Tokenizer, fake: Running) -> None:
    fake.slots.special = {"chat_template": TEMPLATE}
    text = "[user] Hello [assistant]"
    token, expected = tokenizer.encode(text).ids[-1], []
    for _ in range(5):
        expected.append(token := FakeSlots.next(token))
    words: Any = {"model": "x", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]}
    with client(fake.port) as asking:
        whole = asking.chat.completions.create(**words, max_completion_tokens=5, logprobs=True, top_logprobs=2)
        parts = list(asking.chat.completions.create(**words, max_tokens=5, stream=True))
        with pytest.raises(openai.BadRequestError, match="no system"):
            asking.chat.completions.create(model="x", messages=[{"role": "system", "content": "be"}])
    assert [feed.ids for feed in fake.slots.steps[0]] == [tokenizer.encode(text).ids], "the template was rendered"
    message = tokenizer.decode(expected)
    assert (whole.choices[0].message.content, whole.choices[0].message.role) == (message, "assistant")
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == message
    told = whole.choices[0].logprobs
    assert told is not None and told.content is not None
    assert "".join(one.token for one in told.content) == message
    for one in told.content:
        assert one.top_logprobs[0].token == one.token and len(one.top_logprobs) == 2
        assert one.bytes == list(one.token.encode())
        assert -0.01 < one.logprob <= 0 and one.top_logprobs[1].logprob == pytest.approx(-50, abs=0.1)


def test_logprobs_of_a_completion_are_the_models(real: Running, package: Path) -> None:
    import torch

    with client(real.port) as asking:
        got = asking.completions.create(model="t", prompt=PROMPTS[1], max_tokens=6, temperature=0, logprobs=3)
    told = got.choices[0].logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs and told.text_offset
    model = Model.open(package)
    ids, session = model.encode(PROMPTS[1]), model.session()
    for place in range(6):
        logits = session.feed(ids)
        values = torch.log_softmax(logits, -1)
        ids = [int(logits.argmax())]
        assert told.token_logprobs[place] == pytest.approx(float(values.max()), abs=1e-4)
        assert told.tokens[place] == model.tokenizer.decode(ids, skip_special_tokens=False)
        assert sorted(told.top_logprobs[place].values())[-1] == pytest.approx(float(values.max()), abs=1e-4)
    model.close()


def test_requests_at_once_get_what_each_gets_alone(real: Running, package: Path) -> None:
    expected = {prompt: alone(package, prompt, 40) for prompt in PROMPTS}

    def once(prompt: str) -> tuple[str, str]:
        pieces = stream(real.port, COMPLETE, {"prompt": prompt, "temperature": 0, "max_tokens": 40})
        return prompt, "".join(part["choices"][0]["text"] for part in pieces if part != "[DONE]")

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(once, PROMPTS * 3))
    for prompt, text in found:
        assert text == expected[prompt]


def test_a_seed_gives_the_same_text_and_no_seed_another(real: Running) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 30, "temperature": 1.5}
    texts = [ask(real.port, COMPLETE, {**body, "seed": seed})[2]["choices"][0]["text"] for seed in (5, 5, 6)]
    free = [ask(real.port, COMPLETE, body)[2]["choices"][0]["text"] for _ in range(2)]
    assert texts[0] == texts[1] != texts[2]
    assert free[0] != free[1]


def test_stop_texts_end_a_text_and_are_never_shown(fake: Running, tokenizer: Tokenizer) -> None:
    body = {"prompt": [70], "temperature": 0, "max_tokens": 15}
    whole = ask(fake.port, COMPLETE, body)[2]["choices"][0]["text"]
    stop = whole[6:9]
    got = ask(fake.port, COMPLETE, {**body, "stop": ["never", stop]})[2]
    assert (got["choices"][0]["text"], got["choices"][0]["finish_reason"]) == (whole[:6], "stop")
    parts = [part for part in stream(fake.port, COMPLETE, {**body, "stop": stop}) if part != "[DONE]"]
    assert "".join(part["choices"][0]["text"] for part in parts) == whole[:6]
    held = ask(fake.port, COMPLETE, {**body, "stop": whole[13:15] + "?"})[2]["choices"][0]
    assert (held["text"], held["finish_reason"]) == (whole, "length"), "what only began like a stop text is shown"


def test_a_prompt_is_read_in_pieces_between_steps_of_a_running_stream(fake: Running) -> None:
    fake.slots.seconds = 0.002
    pieces = stream(fake.port, COMPLETE, {"prompt": [70], "max_tokens": 400, "temperature": 0})
    next(pieces)
    ask(fake.port, COMPLETE, {"prompt": [80] * 300, "max_tokens": 1})
    steps = [step for step in fake.slots.steps if any(len(feed.ids) > 1 for feed in step)]
    assert [max(len(feed.ids) for feed in step) for step in steps] == [64, 64, 64, 64, 44]
    assert all(sorted(len(feed.ids) for feed in step)[0] == 1 for step in steps), "the stream went on in every step"
    pieces.close()


def test_a_client_that_hangs_up_frees_its_slot_within_a_step(fake: Running) -> None:
    fake.slots.seconds = 0.02
    first = stream(fake.port, COMPLETE, {"prompt": [70], "max_tokens": 50_000})
    second = stream(fake.port, COMPLETE, {"prompt": [71], "max_tokens": 50_000})
    next(first), next(second)
    assert ask(fake.port, "/v1/engram/figures")[2]["busy"] == 2
    first.close()
    fake.wait_for(lambda: ask(fake.port, "/v1/engram/figures")[2]["busy"] == 1)
    begun = len(fake.slots.steps)
    assert ask(fake.port, COMPLETE, {"prompt": [90], "max_tokens": 3})[0] == 200
    assert len(fake.slots.steps) - begun < 8
    second.close()
    fake.wait_for(lambda: fake.app.batcher.idle)
    count = len(fake.slots.steps)
    time.sleep(0.1)
    assert len(fake.slots.steps) == count, "nobody asks, nothing is computed"
    assert "engram_cancelled_requests_total 2" in ask(fake.port, "/metrics")[2]


def test_who_hangs_up_without_streaming_frees_its_place_too(fake: Running) -> None:
    fake.slots.seconds = 0.01
    body = json.dumps({"prompt": [70], "max_tokens": 50_000}).encode()
    head = f"POST {COMPLETE} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    lines = [socket.create_connection(("127.0.0.1", fake.port)) for _ in range(3)]  # two slots, one waits
    for line in lines:
        line.sendall(head + body)
    fake.wait_for(lambda: fake.app.metrics.busy == 2 and fake.app.metrics.queued == 1)
    for line in lines:
        line.close()
    fake.wait_for(lambda: fake.app.batcher.idle)


@pytest.mark.parametrize("fake", [{"queue": 1, "seconds": 0.01}], indirect=True)
def test_a_full_queue_answers_429(fake: Running) -> None:
    running = [stream(fake.port, COMPLETE, {"prompt": [70 + n], "max_tokens": 50_000}) for n in range(2)]
    for pieces in running:
        next(pieces)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, fake.port, COMPLETE, {"prompt": [75], "max_tokens": 2})
        fake.wait_for(lambda: fake.app.metrics.queued == 1)
        with client(fake.port) as asking, pytest.raises(openai.RateLimitError) as refused:
            asking.completions.create(model="t", prompt="x")
        assert refused.value.response.headers["retry-after"] == "1"
        assert refused.value.code == "queue_full"
        running[0].close()
        assert waiting.result()[0] == 200, "who waits gets its turn"
    running[1].close()


@pytest.mark.parametrize("fake", [{"timeout": 0.4, "seconds": 0.02, "count": 1}], indirect=True)
def test_a_request_that_takes_too_long_ends(fake: Running) -> None:
    begun = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(ask, fake.port, COMPLETE, {"prompt": [70], "max_tokens": 50_000})
        fake.wait_for(lambda: fake.app.metrics.busy == 1)
        status, headers, body = ask(fake.port, COMPLETE, {"prompt": [71], "max_tokens": 50_000})
        assert other.result()[0] == status == 504
    assert (body["error"]["code"], headers["x-should-retry"]) == ("timeout", "false")
    assert time.monotonic() - begun < 3
    parts = list(stream(fake.port, COMPLETE, {"prompt": [70], "max_tokens": 50_000}))
    assert parts[-1]["error"]["code"] == "timeout", "a stream that has begun ends with the error"
    assert len(parts) > 2 and fake.app.batcher.idle


def test_a_step_that_fails_ends_the_request_at_fault_and_no_other(fake: Running) -> None:
    poison = 290

    def fault(feeds: Sequence[Feed]) -> None:
        if any(poison in feed.ids for feed in feeds):
            raise RuntimeError("a page is damaged")

    fake.slots.fault, fake.slots.seconds = fault, 0.01
    whole = {"prompt": [70, 71, 72], "max_tokens": 60, "temperature": 0}
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(ask, fake.port, COMPLETE, whole)
        fake.wait_for(lambda: len(fake.slots.steps) > 10)
        status, headers, body = ask(fake.port, COMPLETE, {"prompt": [80, poison, 81], "max_tokens": 60})
        assert (status, body["error"]["code"], body["error"]["type"]) == (500, "step_failed", "server_error")
        assert headers["x-should-retry"] == "false" and "damaged" not in str(body)
        answer = good.result()[2]
    fake.slots.fault = lambda feeds: None
    assert answer["choices"][0]["text"] == ask(fake.port, COMPLETE, whole)[2]["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 60
    assert any("a page is damaged" in line for line in fake.says.said)


def test_real_slots_survive_a_failing_step(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(package, PROMPTS[0], 40)
    running = Running(TorchSlots(Model.open(package), 2), package)
    take, left = running.slots.model.reader.take, iter([False] * 20 + [True] + [False] * 1000)

    def sometimes(*given: Any) -> Any:
        if next(left):
            raise OSError("the disk is gone")
        return take(*given)

    monkeypatch.setattr(running.slots.model.reader, "take", sometimes)
    body = {"temperature": 0, "max_tokens": 40}
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda p: ask(running.port, COMPLETE, {**body, "prompt": p}), [PROMPTS[0]] * 2))
    assert any("the disk is gone" in line for line in running.says.said)
    assert [answer["choices"][0]["text"] for status, _, answer in found if status == 200]
    for status, _, answer in found:
        assert status == 500 or answer["choices"][0]["text"] == expected
    assert ask(running.port, COMPLETE, {**body, "prompt": PROMPTS[0]})[2]["choices"][0]["text"] == expected
    running.close()


def test_a_prefix_is_taken_from_the_slot_that_has_it(fake: Running) -> None:
    def reused(prompt: list[int]) -> int:
        answer = ask(fake.port, COMPLETE, {"prompt": prompt, "max_tokens": 2, "temperature": 0})[2]
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    first, second = [70, 71, 72, 73, 74], [80, 81, 82, 83]
    assert [reused(first), reused(second)] == [0, 0]
    assert [reused([*first, 90]), reused([*second, 91])] == [5, 4]
    assert "engram_prompt_tokens_reused_total 9" in ask(fake.port, "/metrics")[2]


def test_a_slow_reader_holds_nobody_up(fake: Running) -> None:
    body = json.dumps({"prompt": [70], "max_tokens": 20_000, "stream": True}).encode()
    lazy = socket.socket()
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lazy.connect(("127.0.0.1", fake.port))
    lazy.sendall(f"POST {COMPLETE} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    fake.wait_for(lambda: len(fake.slots.steps) > 0)
    for _ in range(3):
        assert ask(fake.port, COMPLETE, {"prompt": [80], "max_tokens": 20})[0] == 200
    fake.wait_for(lambda: fake.app.batcher.idle, 60)
    assert ask(fake.port, "/health")[0] == 200
    lazy.settimeout(30)
    got = b""
    while b"[DONE]" not in got[-200:]:
        got += lazy.recv(65536)
    assert got.count(b"data: ") == 20_002, "what was not read waited"
    lazy.close()


@pytest.mark.parametrize("fake", [{"timeout": 1.0}], indirect=True)
def test_a_reader_that_never_reads_is_dropped(fake: Running) -> None:
    body = json.dumps({"prompt": [70], "max_tokens": 30_000, "stream": True, "engram": {"gates": True}}).encode()
    lazy = socket.socket()
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lazy.connect(("127.0.0.1", fake.port))
    lazy.sendall(f"POST {COMPLETE} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    fake.wait_for(lambda: len(fake.slots.steps) > 0)
    fake.wait_for(lambda: fake.app.metrics.busy == 0, 30)
    time.sleep(1.5)
    lazy.settimeout(10)
    got = b""
    while piece := lazy.recv(65536):
        got += piece
    assert b"[DONE]" not in got, "the connection was closed in the middle"
    lazy.close()


def test_a_prompt_beyond_the_context_is_refused_and_a_long_text_ends_at_it(real: Running) -> None:
    status, _, answer = ask(real.port, COMPLETE, {"prompt": [70] * 257})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    got = ask(real.port, COMPLETE, {"prompt": [70] * 250, "max_tokens": 100, "temperature": 0})[2]
    assert got["choices"][0]["finish_reason"] == "length"
    assert got["usage"]["completion_tokens"] == 7, "256 positions are fed, and one token is written after the last"


def test_gates_come_only_to_who_asks_and_are_the_models(real: Running, package: Path) -> None:
    import numpy as np

    body = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 6}
    plain = [part for part in stream(real.port, COMPLETE, body) if part != "[DONE]"]
    assert not any("engram" in part for part in plain)
    parts = [part for part in stream(real.port, COMPLETE, {**body, "engram": {"gates": True}}) if part != "[DONE]"]
    text = "".join(part["choices"][0]["text"] for part in parts if part["choices"])
    assert text == "".join(part["choices"][0]["text"] for part in plain)
    notes = [part["engram"] for part in parts if part["choices"] and "engram" in part]
    model = Model.open(package)
    ids = model.encode(PROMPTS[0]) + [note["id"] for note in notes]
    rows = model.layout.rows(np.array([ids]))
    seen: dict[int, Any] = {}
    import torch

    with torch.inference_mode():
        model.engram.states(torch.tensor([ids]), memory := model.memory(rows), watch=seen)
        opened = {n: model.engram.gate(n).open(seen[n][:, :, None], memory[n])[0, :, 0] for n in (1, 3)}
    begin = len(ids) - 6
    for place, note in enumerate(notes[:-1]):
        for layer in (1, 3):
            assert note["gates"][str(layer)] == pytest.approx(float(opened[layer][begin + place]), abs=2e-4)
            assert note["rows"][str(layer)] == rows[layer][0, begin + place].tolist()
        assert note["codec"] == "f32"
        grams = [model.tokenizer.decode(ids[begin + place + 1 - n : begin + place + 1]) for n in (2, 3)]
        assert note["ngrams"] == grams
    assert notes[-1]["gates"] is None, "the last token is never fed"
    prompt = next(part["engram"]["prompt"] for part in parts if "prompt" in part.get("engram", {}))
    assert prompt[-1]["gates"]["3"] == pytest.approx(float(opened[3][begin - 1]), abs=2e-4)
    model.close()


@pytest.mark.parametrize("fake", [{"seconds": 0.01, "grace": 30.0}], indirect=True)
def test_going_down_refuses_what_is_new_and_finishes_what_runs(fake: Running) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, fake.port, COMPLETE, {"prompt": [70], "max_tokens": 60})
        fake.wait_for(lambda: fake.app.metrics.busy == 1)
        fake.ask_to_stop()
        fake.wait_for(lambda: not fake.app.batcher.alive)
        status, headers, answer = ask(fake.port, COMPLETE, {"prompt": [71]})
        assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "shutting_down", "5")
        assert ask(fake.port, "/health")[0] == 503
        assert running.result()[2]["usage"]["completion_tokens"] == 60
    fake.close()
    assert fake.slots.closed


@pytest.mark.parametrize("fake", [{"seconds": 0.01, "grace": 0.3}], indirect=True)
def test_what_does_not_finish_within_the_grace_is_told(fake: Running) -> None:
    pieces = stream(fake.port, COMPLETE, {"prompt": [70], "max_tokens": 50_000})
    next(pieces)
    fake.ask_to_stop()
    assert list(pieces)[-1]["error"]["code"] == "shutting_down"
    fake.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_real_process_serves_and_ends_with_a_signal(package: Path, number: signal.Signals) -> None:
    with process(package, "--slots", "2", ENGRAM_API_KEY="a long secret") as (child, port):
        with client(port, "a long secret") as asking:
            text = asking.completions.create(model="t", prompt=PROMPTS[0], max_tokens=8, temperature=0).choices[0].text
        assert text == alone(package, PROMPTS[0], 8)
        child.send_signal(number)
        assert child.wait(30) == 0
        assert child.stderr is not None and "served 8 tokens" in child.stderr.read()


def test_a_broken_thread_leaves_nobody_waiting(fake: Running) -> None:
    def fault(feeds: Sequence[Feed]) -> None:
        raise SystemExit  # no Exception: the thread ends

    fake.slots.fault = fault
    threading.excepthook = lambda args: None
    try:
        status, _, answer = ask(fake.port, COMPLETE, {"prompt": [70]})
    finally:
        threading.excepthook = threading.__excepthook__
    assert (status, answer["error"]["code"]) == (503, "shutting_down")
    assert ask(fake.port, "/health")[0] == 503
