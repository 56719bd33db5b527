"""One request's text as it grows: tokens sampled, decoded, cut at stop texts, with log-probabilities."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engram.runtime.generate import Sampler

COLDEST = 1e-3  # below this temperature the likeliest token is taken: logits divided by less overflow


@dataclass
class Logprob:
    """A token's log-probability under the model (temperature 1), and those of the likeliest."""

    text: str
    value: float
    top: list[tuple[str, float]]


@dataclass
class Written:
    """One token: its id, the text that may be shown now, and what was asked about it."""

    token: int
    text: str
    context: list[int]  # the last tokens up to this one
    logprob: Logprob | None = None
    gates: dict[int, float] | None = None  # by layer; of a token that is never fed, unknown
    stopped: bool = False  # it ends the text, and is not part of it


@dataclass
class Prompt:
    """How far the gates opened at the prompt's tokens from `first` on, by layer; NaN where that is not known."""

    ids: list[int]
    first: int
    gates: dict[int, list[float]]


@dataclass
class Finished:
    """The end of a text: why, the rest of it, and the tokens spent."""

    reason: str
    text: str
    prompt_tokens: int
    reused_tokens: int
    tokens: int


@dataclass
class Writer:
    """Samples and decodes one text."""

    tokenizer: Any
    prompt: list[int]
    stop_ids: frozenset[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stops: tuple[str, ...] = ()
    top: int | None = None
    context: int = 8  # tokens that `Written.context` holds
    reused: int = 0
    tokens: int = 0
    ended: str | None = None
    _back: str = ""  # text that may be the beginning of a stop text
    _recent: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Everything that a text begins with."""
        from tokenizers.decoders import DecodeStream

        temperature = 0.0 if self.temperature < COLDEST else self.temperature
        seed = secrets.randbits(63) if self.seed is None else self.seed
        self._sampler = Sampler(temperature, max(self.top_p, 1e-9), seed)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._recent = self.prompt[-self.context :]

    def write(self, logits_V: Tensor) -> Written:
        """The next token. `ended` says why this was the last one, if it was."""
        token = self._sampler.pick(logits_V)
        self._recent = [*self._recent, token][-self.context :]
        written = Written(token, "", list(self._recent))
        if token in self.stop_ids:
            self.ended, written.stopped = "stop", True
            return written
        self.tokens += 1
        written.text = self._cut(self._stream.step(self.tokenizer, token) or "")
        if self.top is not None:
            written.logprob = self._logprob(logits_V, token, self.top)
        if self.ended is None and self.tokens >= self.max_tokens:
            self.ended = "length"
        return written

    def finish(self) -> Finished:
        """What is said at the end."""
        return Finished(self.ended or "stop", self._back, len(self.prompt), self.reused, self.tokens)

    def _cut(self, piece: str) -> str:
        """What of the text so far can be no part of a stop text; ends the text where there is one."""
        if not self.stops:
            return piece
        text = self._back + piece
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.ended, self._back = "stop", ""
            return text[: min(found)]
        longest = max(len(stop) for stop in self.stops) - 1
        ends = range(min(longest, len(text)), 0, -1)
        kept = next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)
        self._back = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _logprob(self, logits_V: Tensor, token: int, top: int) -> Logprob:
        values_V = torch.log_softmax(logits_V, dim=-1)
        best = values_V.topk(min(top, len(values_V)))
        pairs = [(self._name(int(n)), float(v)) for n, v in zip(best.indices, best.values, strict=True)]
        return Logprob(self._name(token), float(values_V[token]), pairs)

    def _name(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special_tokens=False))
