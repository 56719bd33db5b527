"""Answers in OpenAI's shapes: whole objects and the chunks of a stream, of completions and of chats."""

from __future__ import annotations

import secrets
import time
from math import isnan
from typing import Any

from engram.runtime.serve_explain import Explainer
from engram.runtime.serve_request import Wish
from engram.runtime.serve_write import Finished, Logprob, Prompt, Written


class Reply:
    """One answer, piece by piece or whole."""

    def __init__(self, wish: Wish, model: str, explainer: Explainer) -> None:
        self._wish, self._explainer = wish, explainer
        kind = ("chat.completion.chunk" if wish.stream else "chat.completion") if wish.chat else "text_completion"
        self._base = {
            "id": ("chatcmpl-" if wish.chat else "cmpl-") + secrets.token_hex(12), "object": kind,
            "created": int(time.time()), "model": model,
        }  # fmt: skip
        self._texts: list[str] = []
        self._logprobs: list[Logprob] = []
        self._notes: list[dict[str, Any]] = []
        self._place = 0  # characters so far

    def begin(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return [self._chunk({"role": "assistant", "content": ""})] if self._wish.chat else []

    def prompt(self, prompt: Prompt) -> list[dict[str, Any]]:
        """Gates of the prompt: an object that only who asked for gates gets."""
        keep, notes = self._explainer.context, []
        for place in range(prompt.first, len(prompt.ids)):
            here = {layer: values[place - prompt.first] for layer, values in prompt.gates.items()}
            gates = {layer: value for layer, value in here.items() if not isnan(value)}
            notes.append(self._explainer.token(prompt.ids[max(0, place + 1 - keep) : place + 1], gates))
        self._notes.append({"prompt": notes, "reused": prompt.first})
        return [{**self._base, "choices": [], "engram": self._notes[-1]}]

    def token(self, written: Written) -> list[dict[str, Any]]:
        """Chunks of one token: none where there is nothing to tell."""
        note = self._explainer.token(written.context, written.gates) if self._wish.gates else None
        if note is not None:
            self._notes.append(note)
        if not written.text and written.logprob is None and note is None:
            return []
        logprobs = None if written.logprob is None else self._shape([written.logprob], self._place)
        self._texts.append(written.text)
        self._place += len(written.text)
        if written.logprob is not None:
            self._logprobs.append(written.logprob)
        chunk = self._chunk({"content": written.text}, logprobs)
        return [chunk if note is None else {**chunk, "engram": note}]

    def end(self, finished: Finished) -> list[dict[str, Any]]:
        """What a stream ends with: the rest of the text, the reason, and the usage where it was asked for."""
        rest = [self._chunk({"content": finished.text})] if finished.text else []
        last = [self._chunk({}, reason=finished.reason)]
        usage = [{**self._base, "choices": [], "usage": _usage(finished)}] if self._wish.include_usage else []
        return rest + last + usage

    def whole(self, finished: Finished) -> dict[str, Any]:
        """The answer that is not streamed, after every token was shown to `token`."""
        text = "".join(self._texts) + finished.text
        choice: dict[str, Any] = {"index": 0, "finish_reason": finished.reason}
        choice["logprobs"] = self._shape(self._logprobs, 0) if self._wish.top is not None else None
        if self._wish.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        answer = {**self._base, "choices": [choice], "usage": _usage(finished)}
        return {**answer, "engram": self._notes} if self._wish.gates else answer

    def _chunk(self, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": logprobs, "finish_reason": reason}
        choice |= {"delta": delta} if self._wish.chat else {"text": delta.get("content", "")}
        return {**self._base, "choices": [choice], **({"usage": None} if self._wish.include_usage else {})}

    def _shape(self, logprobs: list[Logprob], place: int) -> dict[str, Any]:
        if self._wish.chat:
            return {
                "content": [
                    {**_entry(one.text, one.value), "top_logprobs": [_entry(text, value) for text, value in one.top]}
                    for one in logprobs
                ],
                "refusal": None,
            }
        offsets = []
        for one in logprobs:
            offsets.append(place)
            place += len(one.text)
        return {
            "tokens": [one.text for one in logprobs], "token_logprobs": [one.value for one in logprobs],
            "top_logprobs": [dict(reversed(one.top)) for one in logprobs] if self._wish.top else None,
            "text_offset": offsets,
        }  # fmt: skip


def _entry(text: str, value: float) -> dict[str, Any]:
    """`bytes` is null for a part of a character, which no text stands for."""
    return {"token": text, "logprob": value, "bytes": None if "�" in text else list(text.encode())}


def _usage(finished: Finished) -> dict[str, Any]:
    return {
        "prompt_tokens": finished.prompt_tokens, "completion_tokens": finished.tokens,
        "total_tokens": finished.prompt_tokens + finished.tokens,
        "prompt_tokens_details": {"cached_tokens": finished.reused_tokens},
    }  # fmt: skip
