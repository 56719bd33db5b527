"""`engram serve`: OpenAI's interface and a page over a package, for several users at once."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import re
import signal
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from engram import EngramError, Progress
from engram.quantize.package import open_package
from engram.runtime.generate import RunConfig, choose_engine, open_llama, open_torch, render_chat
from engram.runtime.serve_batch import Batcher, Event, Job
from engram.runtime.serve_explain import Explainer
from engram.runtime.serve_http import LOOPBACK, Door, Exchange, Gone, Message, Receive, Send
from engram.runtime.serve_metrics import Metrics
from engram.runtime.serve_reply import Reply
from engram.runtime.serve_request import ApiError, Wish, parse
from engram.runtime.serve_write import Finished, Prompt, Writer
from engram.runtime.slots import Slots
from engram.runtime.slots_torch import TorchSlots

PAGE = Path(__file__).parent / "web" / "index.html"


class ServeError(EngramError):
    """A server that cannot be started: an address that is taken, or open to others without a key."""


@dataclass(frozen=True)
class ServeConfig:
    """What `engram serve` needs to know."""

    package: Path
    host: str = "127.0.0.1"
    port: int = 8080  # 0: any that is free
    slots: int = 4
    queue: int = 16
    context: int = 4096  # positions of one slot; the model's own at most
    api_key: str | None = None
    timeout: float = 600.0  # seconds of one request, waiting included
    grace: float = 30.0  # seconds to finish running requests in when the server is stopped
    largest_body: int = 1 << 20
    offload: str = "disk"
    table_cache: int | None = None
    dtype: str | None = None
    verify: str = "first-touch"
    table_io: str = "auto"
    engine: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what would be open to everybody: a line of warning is not read by those it concerns."""
        if self.api_key is not None and len(self.api_key.strip()) < 8:
            raise ServeError("the API key is shorter than 8 characters", hint="make one: openssl rand -hex 16")
        if not self.loopback and self.api_key is None:
            raise ServeError(
                f"host {self.host} is reached from other machines, and there is no API key",
                hint="pass one with --api-key or ENGRAM_API_KEY, or keep --host 127.0.0.1",
            )

    @property
    def loopback(self) -> bool:
        """Only this machine reaches it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class App:
    """The ASGI application: every route, no files."""

    def __init__(self, slots: Slots, explainer: Explainer, name: str, config: ServeConfig, progress: Progress) -> None:
        self.name, self.config, self._explainer = name, config, explainer
        self.metrics = Metrics()
        self.slots = slots
        self.batcher = Batcher(slots, config.queue, self.metrics, progress)
        self.progress, self._created = progress, int(time.time())
        self._door = Door(frozenset({*LOOPBACK, config.host}) if config.loopback else None, config.api_key)
        page = PAGE.read_text("utf-8")
        self._page, self._policy = page.encode(), _policy(page)
        self._routes = {
            ("GET", "/"): self._front, ("GET", "/health"): self._health, ("GET", "/metrics"): self._metrics,
            ("GET", "/v1/models"): self._models, ("POST", "/v1/completions"): self._complete,
            ("POST", "/v1/chat/completions"): self._complete, ("GET", "/v1/engram/figures"): self._figures,
        }  # fmt: skip

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request; whatever goes wrong ends this one only."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send, self.config.timeout)
        try:
            await self._answer(exchange)
        except Gone:
            exchange.status = exchange.status or 499
        except ApiError as wrong:
            await self._refuse(exchange, wrong)
        except Exception as wrong:
            self.progress.say(f"{exchange.method} {exchange.path}: {type(wrong).__name__}: {wrong}")
            await self._refuse(exchange, ApiError(500, "internal_error", "the server failed at this request"))
        self.metrics.answered(exchange.status)

    async def _answer(self, exchange: Exchange) -> None:
        self._door.check_origin(exchange.headers)
        if exchange.path not in ("/", "/health"):
            self._door.check_key(exchange.headers)
        work = self._routes.get((exchange.method, exchange.path))
        if work is not None:
            return await work(exchange)
        if exchange.method == "GET" and exchange.path == f"/v1/models/{self.name}":
            return await exchange.json(200, self._model())
        allowed = [method for method, path in self._routes if path == exchange.path]
        if allowed:
            raise ApiError(405, "method_not_allowed", f"{exchange.path} takes {', '.join(allowed)} only",
                           headers={"allow": ", ".join(allowed)})  # fmt: skip
        raise ApiError(404, "not_found", f"there is nothing at {exchange.path[:100]!r}")

    async def _refuse(self, exchange: Exchange, wrong: ApiError) -> None:
        """An error, as an answer or, where one was begun, as the stream's last object."""
        with suppress(Gone):
            if exchange.status:
                await exchange.events(wrong.body)
                await exchange.end_events(done=False)
                exchange.status = wrong.status
            else:
                await exchange.json(wrong.status, wrong.body, wrong.headers)

    async def _front(self, exchange: Exchange) -> None:
        await exchange.answer(200, self._page, "text/html; charset=utf-8", {"content-security-policy": self._policy})

    async def _health(self, exchange: Exchange) -> None:
        good = self.batcher.alive
        await exchange.json(200 if good else 503, {"status": "ok" if good else "shutting_down"})

    async def _metrics(self, exchange: Exchange) -> None:
        await exchange.answer(200, self.metrics.text().encode(), "text/plain; version=0.0.4; charset=utf-8")

    async def _figures(self, exchange: Exchange) -> None:
        await exchange.json(200, self.metrics.figures())

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._created, "owned_by": "engram"}

    async def _models(self, exchange: Exchange) -> None:
        await exchange.json(200, {"object": "list", "data": [self._model()]})

    async def _complete(self, exchange: Exchange) -> None:
        wish = parse(await exchange.body(self.config.largest_body), chat=exchange.path.startswith("/v1/chat"))
        ids = await asyncio.to_thread(self._ids, wish)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()

        def send(event: Event | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(ids, self._writer(wish, ids), send, self.config.timeout, wish.gates)
        self.batcher.submit(job)
        watcher = asyncio.create_task(exchange.gone())
        watcher.add_done_callback(lambda _: events.put_nowait(None))
        try:
            await self._tell(exchange, wish, events)
        finally:
            watcher.cancel()
            if not job.ended:
                self.batcher.cancel(job)

    async def _tell(self, exchange: Exchange, wish: Wish, events: asyncio.Queue[Event | None]) -> None:
        reply = Reply(wish, self.name, self._explainer)
        while True:
            event = await events.get()
            if event is None:
                raise Gone
            if isinstance(event, ApiError):
                raise event
            if wish.stream and not exchange.status:
                await exchange.events(*reply.begin())
            if isinstance(event, Finished):
                break
            if isinstance(event, Prompt):  # thousands of tokens to explain: not while others wait for theirs
                chunks = await asyncio.to_thread(reply.prompt, event)
            else:
                chunks = reply.token(event)
            if wish.stream:
                await exchange.events(*chunks)
        if not wish.stream:
            return await exchange.json(200, reply.whole(event))
        await exchange.events(*reply.end(event))
        await exchange.end_events()

    def _ids(self, wish: Wish) -> list[int]:
        """Token ids of a wish; ApiError 400 where there are none, too many, or the template refuses the messages."""
        field = "messages" if wish.chat else "prompt"
        if isinstance(wish.prompt, list):
            ids, known = wish.prompt, self.slots.tokenizer.get_vocab_size()
            if not all(0 <= number < known for number in ids):
                raise ApiError(400, "invalid_value", f"prompt has an id outside 0 … {known - 1}", param="prompt")
        elif wish.chat:
            from jinja2 import TemplateError

            try:
                text = render_chat(self.slots.tokenizer, self.slots.special, wish.messages)
            except TemplateError as wrong:
                raise ApiError(400, "invalid_value", f"messages do not fit the chat template: {wrong}",
                               param=field) from None  # fmt: skip
            ids = self.slots.encode(text)
        else:
            ids = self.slots.begin() + self.slots.encode(wish.prompt)
        if not ids:
            raise ApiError(400, "invalid_value", f"{field} is empty", param=field)
        if len(ids) > self.slots.context:
            raise ApiError(
                400, "context_length_exceeded",
                f"{field} has {len(ids)} tokens, the model's context holds {self.slots.context}", param=field,
            )  # fmt: skip
        return ids

    def _writer(self, wish: Wish, ids: list[int]) -> Writer:
        return Writer(
            self.slots.tokenizer, ids, self.batcher.stops, wish.max_tokens or self.slots.context, wish.temperature,
            wish.top_p, wish.seed, wish.stops, wish.top, self._explainer.context,
        )  # fmt: skip


def _policy(page: str) -> str:
    """A Content-Security-Policy under which the page's own script and style run, and nothing else."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in found)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def bound(host: str, port: int) -> socket.socket:
    """A listening socket. ServeError where the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
        return listening
    except OSError as wrong:
        raise ServeError(
            f"{host}:{port} cannot be listened on: {wrong.strerror or wrong}", hint="choose another --port"
        ) from None


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: going down is ours, it refuses and finishes first."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def listen(app: App, listening: socket.socket, stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """Serve until `stop` is set; then refuse what is new, and finish what runs within the grace or until `hurry`."""
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", loop="asyncio", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = _Server(config)
    serving = asyncio.create_task(server.serve([listening]))
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    app.batcher.refuse()
    if not app.batcher.idle:
        app.progress.say(f"finishing what runs, {app.config.grace:g} s at most")
    until = time.monotonic() + app.config.grace
    while not (app.batcher.idle or hurry.is_set() or serving.done()) and time.monotonic() < until:
        await asyncio.sleep(0.02)
    await asyncio.to_thread(app.batcher.close)
    server.should_exit = True
    await serving
    waiting.cancel()


def open_slots(config: ServeConfig, progress: Progress) -> Slots:
    """The package's model, ready for several timelines."""
    wish = RunConfig(
        config.package, offload=config.offload, table_cache=config.table_cache, dtype=config.dtype,
        verify=config.verify, table_io=config.table_io, engine=config.engine,
    )  # fmt: skip
    if choose_engine(wish, progress) == "llama":
        return open_llama(wish, count=config.slots, context=config.context)
    return TorchSlots(open_torch(wish), config.slots, config.context)


def serve(config: ServeConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Open the package and serve it until SIGINT or SIGTERM; a second signal waits for nothing. Returns the totals."""
    progress = progress or Progress()
    listening = bound(config.host, config.port)
    with listening:
        with progress.task(f"open {config.package.name}"):
            slots = open_slots(config, progress)
        with open_package(config.package, verify="off") as package:
            name = config.package.resolve().name
            app = App(slots, Explainer(package, slots.tokenizer), name, config, progress)
            host = f"[{config.host}]" if ":" in config.host else config.host
            progress.say(f"serving {name} at http://{host}:{listening.getsockname()[1]}")
            asyncio.run(_until_stopped(app, listening))
    return dict(app.metrics.figures())


async def _until_stopped(app: App, listening: socket.socket) -> None:
    stop, hurry, loop = asyncio.Event(), asyncio.Event(), asyncio.get_running_loop()

    def heard() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, heard)
    await listen(app, listening, stop, hurry)
