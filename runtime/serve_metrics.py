"""What a server counts, as Prometheus reads it. Threads may share it."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping

LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
RATE_WINDOW_S = 10.0
_HELP = {
    "prompt_tokens": "Tokens of the prompts that were begun.",
    "prompt_tokens_reused": "Prompt tokens that a slot held already: hits of the prefix cache.",
    "generated_tokens": "Tokens written.",
    "rows_asked": "Table rows that were asked for.",
    "rows_read": "Table rows decoded from the tables.",
    "rows_hot": "Table rows served by the hot rows in memory: hits of the row cache.",
    "bytes_read": "Stored bytes of the rows read.",
    "pages_read": "Pages of 4096 bytes that the device was asked for.",
    "cancelled_requests": "Requests whose client went away.",
    "steps": "Steps of the model.",
}


class Histogram:
    """Counts below each of `bounds`, and the sum."""

    def __init__(self, bounds: tuple[float, ...] = LATENCIES) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, help_text: str) -> list[str]:
        out, total = [f"# HELP {name} {help_text}", f"# TYPE {name} histogram"], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            out.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*out, f"{name}_sum {self.sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """Totals since the start, gauges of now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = dict.fromkeys(_HELP, 0)
        self._statuses: dict[int, int] = {}
        self._recent: deque[tuple[float, int]] = deque()
        self._first, self._between = Histogram(), Histogram()
        self.queued, self.busy, self.slots = 0, 0, 0

    def add(self, name: str, amount: int = 1) -> None:
        """Count up."""
        with self._lock:
            self._totals[name] += amount

    def set_totals(self, counts: Mapping[str, int]) -> None:
        """Totals that somebody else counts: the row reader."""
        with self._lock:
            self._totals.update({name: count for name, count in counts.items() if name in self._totals})

    def answered(self, status: int) -> None:
        """One request was answered."""
        with self._lock:
            self._statuses[status] = self._statuses.get(status, 0) + 1

    def first_token(self, seconds: float) -> None:
        """A request's first token, from its arrival."""
        with self._lock:
            self._first.add(seconds)

    def next_token(self, seconds: float) -> None:
        """A later token, from the one before."""
        with self._lock:
            self._between.add(seconds)

    def wrote(self, tokens: int) -> None:
        """One step wrote so many tokens."""
        now = time.monotonic()
        with self._lock:
            self._totals["generated_tokens"] += tokens
            self._totals["steps"] += 1
            self._recent.append((now, tokens))
            while self._recent[0][0] < now - RATE_WINDOW_S:
                self._recent.popleft()

    def figures(self) -> dict[str, float]:
        """Totals and gauges, for the page."""
        with self._lock:
            return {**self._totals, "tokens_per_second": self._rate(), "queued": self.queued, "busy": self.busy,
                    "slots": self.slots}  # fmt: skip

    def _rate(self) -> float:
        """Tokens a second over the window, or since its first token."""
        now = time.monotonic()
        recent = [(when, tokens) for when, tokens in self._recent if when >= now - RATE_WINDOW_S]
        return sum(tokens for _, tokens in recent) / max(now - recent[0][0], 1.0) if recent else 0.0

    def text(self) -> str:
        """Prometheus' text format, version 0.0.4."""
        out = []
        with self._lock:
            for name, words in _HELP.items():
                full = f"engram_{name}_total"
                out += [f"# HELP {full} {words}", f"# TYPE {full} counter", f"{full} {self._totals[name]}"]
            out += ["# HELP engram_requests_total Requests answered, by status."]
            out += ["# TYPE engram_requests_total counter"]
            out += [f'engram_requests_total{{status="{s}"}} {n}' for s, n in sorted(self._statuses.items())]
            for name, value, words in (
                ("tokens_per_second", f"{self._rate():.3f}", f"Tokens written a second, of {RATE_WINDOW_S:g} seconds."),
                ("queue_length", self.queued, "Requests that wait for a slot."),
                ("slots_busy", self.busy, "Slots that write or read a prompt."),
                ("slots", self.slots, "Slots that there are."),
            ):
                out += [f"# HELP engram_{name} {words}", f"# TYPE engram_{name} gauge", f"engram_{name} {value}"]
            out += self._first.lines("engram_time_to_first_token_seconds", "From arrival to the first token.")
            out += self._between.lines("engram_inter_token_seconds", "Between two tokens of a request.")
        return "\n".join(out) + "\n"
