"""What clients of the OpenAI interface ask for: bodies read, checked, and refused by the name of the field."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

from engram import EngramError

MOST_STOPS, MOST_TOP_LOGPROBS = 16, 20
_ONLY: dict[str, tuple[Any, ...]] = {  # fields that we know and serve with these values only
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "presence_penalty": (0,), "frequency_penalty": (0,),
    "logit_bias": ({},), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "web_search_options": (),
}  # fmt: skip


class ApiError(EngramError):
    """A request that is answered with an error: HTTP status, OpenAI's type and code, the field at fault."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, hint: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message, hint=hint)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        words = f"{self} ({self.hint})" if self.hint else str(self)
        return {"error": {"message": words, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Wish:
    """A request that can be served."""

    chat: bool
    prompt: str | list[int]  # text, or token ids; for a chat empty
    messages: list[dict[str, str]]
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stops: tuple[str, ...]
    top: int | None  # alternatives to report beside each token's log-probability; None reports none
    stream: bool
    include_usage: bool
    gates: bool


def refuse(field: str, rule: str, hint: str = "") -> NoReturn:
    """400, naming the field."""
    raise ApiError(400, "invalid_value", f"{field} {rule}", param=field, hint=hint)


def parse(body: bytes, chat: bool) -> Wish:
    """A body as a wish; ApiError 400 names the field that cannot be served. Unknown fields are left alone."""
    try:
        found = json.loads(body, parse_constant=lambda word: refuse("body", f"holds {word}, which is not JSON"))
    except (ValueError, RecursionError) as wrong:  # a UnicodeDecodeError is a ValueError
        raise ApiError(400, "invalid_json", f"the body is not JSON: {wrong}") from None
    if not isinstance(found, dict):
        raise ApiError(400, "invalid_json", "the body is not a JSON object")
    given = {name: value for name, value in found.items() if value is not None}
    for field, served in _ONLY.items():
        if field in given and given[field] not in served:
            raise ApiError(400, "unsupported_value", f"{field} is not supported by this server", param=field,
                           hint=f"leave {field} out")  # fmt: skip
    top: int | None
    if chat:
        top = _whole(given, "top_logprobs", 0, MOST_TOP_LOGPROBS)
        if not _flag(given, "logprobs"):
            if top is not None:
                refuse("top_logprobs", "needs logprobs: true")
        else:
            top = top or 0
        most = _whole(given, "max_completion_tokens", 1)
        most = _whole(given, "max_tokens", 1) if most is None else most
    else:
        top = _whole(given, "logprobs", 0, MOST_TOP_LOGPROBS)
        most = _whole(given, "max_tokens", 1)
        most = 16 if most is None else most  # OpenAI's default
    options = _object(given, "stream_options")
    return Wish(
        chat=chat, prompt="" if chat else _prompt(given), messages=_messages(given) if chat else [], max_tokens=most,
        temperature=_number(given, "temperature", 1.0, 0.0, 2.0), top_p=_number(given, "top_p", 1.0, 0.0, 1.0),
        seed=_whole(given, "seed", -(1 << 63), (1 << 63) - 1), stops=_stops(given), top=top,
        stream=_flag(given, "stream"), include_usage=_flag(options, "include_usage"),
        gates=_flag(_object(given, "engram"), "gates"),
    )  # fmt: skip


def _prompt(given: dict[str, Any]) -> str | list[int]:
    prompt = given.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return _text("prompt", prompt)
    if isinstance(prompt, list) and prompt and all(type(number) is int for number in prompt):
        return list(prompt)
    refuse("prompt", "must be a text or a list of token ids", "send several prompts as several requests")


def _messages(given: dict[str, Any]) -> list[dict[str, str]]:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        refuse("messages", "must be a list of at least one message")
    found = []
    for place, message in enumerate(messages):
        field = f"messages[{place}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            refuse(field, "must be an object with a role and a content")
        for name in ("tool_calls", "function_call", "audio"):
            if message.get(name):
                refuse(f"{field}.{name}", "is not supported by this server")
        if message["role"] not in ("system", "developer", "user", "assistant"):
            refuse(f"{field}.role", f"{message['role'][:40]!r} is not one of: system, developer, user, assistant")
        role = "system" if message["role"] == "developer" else message["role"]
        found.append({"role": role, "content": _content(f"{field}.content", message.get("content"))})
    return found


def _content(field: str, content: Any) -> str:
    if isinstance(content, str):
        return _text(field, content)
    if not isinstance(content, list):
        refuse(field, "must be a text or a list of text parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            refuse(field, f"has a part of type {str(kind)[:40]!r}, only text is supported")
    return "".join(_text(field, part["text"]) for part in content)


def _text(field: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        refuse(field, "holds half of a surrogate pair, which is no text")
    return text


def _stops(given: dict[str, Any]) -> tuple[str, ...]:
    stops = given.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        refuse("stop", f"must be a text or a list of at most {MOST_STOPS} texts that are not empty")
    return tuple(stops)


def _object(given: dict[str, Any], field: str) -> dict[str, Any]:
    value = given.get(field, {})
    if not isinstance(value, dict):
        refuse(field, "must be an object")
    return value


def _flag(given: dict[str, Any], field: str) -> bool:
    value = given.get(field, False)
    if not isinstance(value, bool):
        refuse(field, "must be true or false")
    return value


def _whole(given: dict[str, Any], field: str, least: int, most: int = 1 << 31) -> int | None:
    value = given.get(field)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        refuse(field, f"must be a whole number from {least} to {most}")
    return value


def _number(given: dict[str, Any], field: str, default: float, least: float, most: float) -> float:
    value = given.get(field, default)
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
        refuse(field, f"must be a number from {least:g} to {most:g}")
    return float(value)
