"""Continuous batching: one thread owns the slots, takes requests in between steps, and steps all of them together.

Prompts are read a piece at a time between decode steps, so that streams that run are not starved.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import Progress
from engram.runtime.serve_metrics import Metrics
from engram.runtime.serve_request import ApiError
from engram.runtime.serve_write import Finished, Prompt, Writer, Written
from engram.runtime.slots import Feed, Slots

PROMPT_ALONE, PROMPT_BESIDE = 512, 64  # prompt tokens of a step where nothing else runs, and beside running streams
COUNT_EVERY_S = 0.25

Event = Written | Prompt | Finished | ApiError


@dataclass(eq=False)
class Job:
    """One request on its way through the slots. `send` is called from the batcher's thread, and must not block."""

    ids: list[int]
    writer: Writer
    send: Callable[[Event], None]
    seconds: float  # how long it may take, waiting included
    gates: bool = False
    began: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    ended: bool = False  # its last event was sent
    slot: int = -1
    todo: list[int] = field(default_factory=list)  # what is to be fed before a token can be sampled
    last: float = 0.0  # when its last token was written
    reading: bool = True  # the prompt is not through yet
    opened: dict[int, list[NDArray[np.float32]]] = field(default_factory=dict)  # gates of the prompt, by layer
    fed: list[int] = field(default_factory=list)  # the prompt's tokens that were fed
    alone: bool = False  # a step that it was part of failed: it is read again in steps of its own
    held: Written | None = None  # with gates: a token that is sent once its gates are known

    def end(self, event: Event) -> None:
        """Send the last event."""
        self.ended = True
        self.send(event)

    @property
    def late(self) -> bool:
        """Its time is over."""
        return time.monotonic() - self.began > self.seconds


class Batcher:
    """The thread that owns the slots."""

    def __init__(self, slots: Slots, most_queued: int, metrics: Metrics, progress: Progress | None = None) -> None:
        self.slots, self.metrics, self._most, self._progress = slots, metrics, most_queued, progress or Progress()
        metrics.slots = slots.count
        self.stops = slots.stop_ids()
        self._wake = threading.Condition()
        self._queue: deque[Job] = deque()
        self._running: dict[int, Job] = {}  # by slot
        self._held: list[list[int]] = [[] for _ in range(slots.count)]  # tokens of every slot
        self._used = [0.0] * slots.count  # when a slot was last given back
        self._refusing = self._ending = False
        self._counted = 0.0
        self._opened: dict[int, dict[int, list[NDArray[np.float32]]]] = {}  # gates of this step, by slot and layer
        self._thread = threading.Thread(target=self._work, name="engram-batcher", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Requests are taken."""
        return self._thread.is_alive() and not self._refusing

    def submit(self, job: Job) -> None:
        """Take a request in. ApiError 429 where the queue is full, 503 where the server is going down."""
        with self._wake:
            if not self.alive:
                raise _going_down()
            if len(self._queue) >= self._most + self.slots.count - len(self._running):
                raise ApiError(
                    429, "queue_full", f"{len(self._queue)} requests are waiting already", hint="ask again later",
                    headers={"retry-after": "1"},
                )  # fmt: skip
            self._queue.append(job)
            self._gauge()
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more: it ends within a step."""
        with self._wake:
            if not job.cancelled:
                job.cancelled = True
                self.metrics.add("cancelled_requests")
            if job in self._queue:
                self._queue.remove(job)
            self._gauge()
            self._wake.notify()

    def refuse(self) -> None:
        """Take no more requests."""
        self._refusing = True

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        with self._wake:
            return not self._running and not self._queue

    def close(self) -> None:
        """End what still runs with 503, let the thread end, close the slots."""
        with self._wake:
            self._refusing = self._ending = True
            self._wake.notify()
        self._thread.join()
        self.slots.close()

    def _gauge(self) -> None:
        self.metrics.queued, self.metrics.busy = len(self._queue), len(self._running)

    def _work(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._queue or self._running or self._ending):
                        self._count()
                        self._wake.wait()
                    if self._ending:
                        return
                    self._tidy()
                    self._admit()
                if self._running:
                    self._step()
                self._count()
        finally:  # also where this thread is broken: nobody may wait for ever
            with self._wake:
                self._refusing = True
                for job in [*self._running.values(), *self._queue]:
                    job.end(_going_down())
                self._running.clear()
                self._queue.clear()
                self._gauge()

    def _count(self) -> None:
        now = time.monotonic()
        if now - self._counted > COUNT_EVERY_S or not self._running:
            self._counted = now
            self.metrics.set_totals(self.slots.counters())

    def _tidy(self) -> None:
        """Let go of requests that nobody waits for or that take too long."""
        for job in list(self._running.values()):
            if job.cancelled:
                self._free(job)
            elif job.late:
                self._fail(job, _too_late(job))
        for job in [job for job in self._queue if job.late]:
            self._queue.remove(job)
            job.end(_too_late(job))
        self._gauge()

    def _admit(self) -> None:
        """Requests into free slots, each into the one that shares the longest prefix with it, else the longest idle."""
        while self._queue and (free := [slot for slot in range(self.slots.count) if slot not in self._running]):
            job = self._queue.popleft()
            slot = max(free, key=lambda slot: (_shared(self._held[slot], job.ids), -self._used[slot]))
            try:
                job.todo = self.slots.reuse(slot, job.ids)
            except Exception as wrong:
                job.end(self._broken(wrong))
                continue
            job.slot, self._running[slot] = slot, job
            reused = len(job.ids) - len(job.todo)
            self._held[slot] = job.ids[:reused]
            job.writer.reused = reused
            self.metrics.add("prompt_tokens", len(job.ids))
            self.metrics.add("prompt_tokens_reused", reused)
        self._gauge()

    def _free(self, job: Job) -> None:
        self._running.pop(job.slot, None)
        self._used[job.slot] = time.monotonic()
        self._gauge()

    def _fail(self, job: Job, wrong: ApiError) -> None:
        self._free(job)
        job.end(wrong)

    def _broken(self, wrong: Exception) -> ApiError:
        self._progress.say(f"a step failed: {type(wrong).__name__}: {wrong}")
        return ApiError(500, "step_failed", "the model could not compute this request", headers=_NO_RETRY)

    def _feeds(self) -> list[Feed]:
        """One token of every stream, and a piece of the prompts that came first."""
        for job in self._running.values():
            if job.alone:
                return [Feed(job.slot, job.todo[:PROMPT_ALONE])]
        writing = [job for job in self._running.values() if not job.reading]
        room = PROMPT_BESIDE if writing else PROMPT_ALONE
        feeds = [Feed(job.slot, job.todo) for job in writing]
        for job in sorted((job for job in self._running.values() if job.reading), key=lambda job: job.began):
            if room > 0:
                feeds.append(Feed(job.slot, job.todo[:room]))
                room -= len(feeds[-1].ids)
        return feeds

    def _step(self) -> None:
        feeds = self._feeds()
        jobs = [self._running[feed.slot] for feed in feeds]
        self._opened = {job.slot: {} for job in jobs if job.gates}
        self.slots.watch = self._watch if self._opened else None
        try:
            logits = self.slots.step(feeds)
        except Exception as wrong:
            return self._after_failure(jobs, wrong)
        now = time.monotonic()
        written = 0
        for feed, job, logits_V in zip(feeds, jobs, logits, strict=True):
            self._held[job.slot] += feed.ids
            job.todo = job.todo[len(feed.ids) :]
            try:
                if job.gates:
                    self._show(job, feed)
                if not job.todo and not job.cancelled:
                    job.alone = False
                    written += self._write(job, logits_V, now)
            except Exception as wrong:
                self._fail(job, self._broken(wrong))
        self.metrics.wrote(written)
        coming = [Feed(job.slot, job.todo) for job in self._running.values() if not job.reading and job.todo]
        if coming:
            with suppress(Exception):  # a hint: what is wrong with these tokens, the step will say
                self.slots.ask(coming)

    def _after_failure(self, jobs: list[Job], wrong: Exception) -> None:
        """A request that fails by itself ends; of several in one step, each is read again by itself."""
        if len(jobs) > 1:
            self._progress.say(f"a step of {len(jobs)} requests failed: {type(wrong).__name__}: {wrong}")
        for job in jobs:
            tokens, self._held[job.slot] = self._held[job.slot] + job.todo, []
            if len(jobs) == 1:
                return self._fail(job, self._broken(wrong))
            try:
                job.todo = self.slots.reuse(job.slot, tokens)
            except Exception as worse:
                self._fail(job, self._broken(worse))
                continue
            self._held[job.slot] = tokens[: len(tokens) - len(job.todo)]
            job.alone, job.fed, job.opened = True, [], {}

    def _write(self, job: Job, logits_V: Any, now: float) -> int:
        """Sample a token and send it; tokens written (0 or 1)."""
        if job.reading:
            job.reading = False
            self.metrics.first_token(now - job.began)
        else:
            self.metrics.next_token(now - job.last)
        job.last = now
        written = job.writer.write(logits_V)
        if not written.stopped:
            full = self.slots.length(job.slot) + 1 > self.slots.context
            ended = job.writer.ended or ("length" if full else None)
            if job.gates:
                job.held = written
            else:
                job.send(written)
            if ended is None:
                job.todo = [written.token]
                return 1
            job.writer.ended = ended
        if job.held is not None:
            job.send(job.held)
        self._free(job)
        job.end(job.writer.finish())
        return 0 if written.stopped else 1

    def _watch(self, slot: int, layer: int, opened_TM: NDArray[np.float32]) -> None:
        if slot in self._opened:
            self._opened[slot].setdefault(layer, []).append(np.array(opened_TM, dtype=np.float32).mean(axis=-1))

    def _show(self, job: Job, feed: Feed) -> None:
        """Gates of what was fed: a prompt's are collected until it is through, a token's let it go."""
        opened = {layer: np.concatenate(parts) for layer, parts in self._opened.get(job.slot, {}).items()}
        if job.reading:
            job.fed += feed.ids
            for layer, part in opened.items():  # of the last norm maybe only the last: the others are not known
                unknown = np.full(len(feed.ids) - len(part), np.nan, dtype=np.float32)
                job.opened.setdefault(layer, []).append(np.concatenate([unknown, part]))
            if not job.todo:
                first = len(job.ids) - len(job.fed)
                gates = {layer: np.concatenate(parts).tolist() for layer, parts in job.opened.items()}
                job.opened = {}
                job.send(Prompt(job.ids, first, gates))
        elif job.held is not None and not job.todo:
            job.held.gates = {layer: float(part[-1]) for layer, part in opened.items()}
            job.send(job.held)
            job.held = None


_NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients ask again on 5xx where they are not told otherwise


def _shared(have: list[int], ids: list[int]) -> int:
    """Length of the shared prefix, at most one short of `ids`."""
    most = min(len(have), len(ids) - 1)
    return next((place for place in range(most) if have[place] != ids[place]), most)


def _going_down() -> ApiError:
    return ApiError(503, "shutting_down", "the server is going down", headers={"retry-after": "5"})


def _too_late(job: Job) -> ApiError:
    return ApiError(504, "timeout", f"the request took longer than {job.seconds:g} s", headers=_NO_RETRY)
