"""A config.json or a GGUF's metadata, key by key: what is missing, of the wrong type or contradictory is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engram import EngramError

NAME = "config.json"
OWN_NAME = "engram_config.json"  # of a memory alone, beside the backbone's or in its place
LARGEST = 1 << 40  # rows, ids and the like: beyond it nothing is published, and primes are slow to find
MOST_LAYERS = 1024  # or heads, or anything else that is listed
MOST_ORDER = 8  # what llama.cpp reads at most
MOST_HEADS = 64
LARGEST_FILE = 1 << 24


class FamilyError(EngramError):
    """A checkpoint that is of no known family, or that contradicts what its family says."""


class Keys:
    """Values by name, each checked when it is asked for; `where` names the file in what is refused."""

    def __init__(self, where: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = where, dict(values)

    def number(self, *names: str, least: int = 0, most: int = LARGEST, default: int | None = None) -> int:
        """A whole number from `least` to `most`."""
        what = f"a number from {least} to {most:,}"
        return int(self._get(names, lambda v: type(v) is int and least <= v <= most, what, default))

    def numbers(self, *names: str, least: int = 0, most: int = LARGEST) -> tuple[int, ...]:
        """A list of at least one whole number, and at most MOST_LAYERS of them."""

        def fits(value: Any) -> bool:
            if not isinstance(value, list) or not 1 <= len(value) <= MOST_LAYERS:
                return False
            return all(type(v) is int and least <= v <= most for v in value)

        return tuple(self._get(names, fits, f"a list of numbers from {least} to {most:,}", None))

    def refuse(self, name: str, known: Any) -> None:
        """Refuse a key that has another value than the only one that this release understands."""
        if name in self.values and self.values[name] not in (known, None):
            raise FamilyError(f"{self.path}: {name} is {self.values[name]!r}, only {known!r} is understood")

    def _get(self, names: tuple[str, ...], fits: Callable[[Any], bool], what: str, default: Any) -> Any:
        found = {name: self.values[name] for name in names if self.values.get(name) is not None}
        if not found:
            if default is not None:
                return default
            raise FamilyError(f"{self.path} lacks the key {' or '.join(map(repr, names))}")
        for name, value in found.items():
            if not fits(value):
                raise FamilyError(f"{self.path}: {name} is {value!r:.80}, expected {what}")
        if len({json.dumps(value) for value in found.values()}) > 1:
            raise FamilyError(f"{self.path} says {found}: they are names of one thing")
        return next(iter(found.values()))


class Header(Keys):
    """The metadata of a GGUF, of which a model's keys begin with its architecture."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.architecture = str(metadata.get("general.architecture"))
        start = self.architecture + "."
        own = {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}
        plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in own.items()}
        super().__init__(path, plain)
        self.tokens = metadata.get("tokenizer.ggml.tokens", ())

    def vocabulary(self) -> int:
        """Token ids."""
        return self.number("vocab_size", least=1, default=len(self.tokens))


class Config(Keys):
    """The keys of a config.json; those of `text_config` come first, as transformers reads them, then `engram_config`.

    `get(name, alias, …)` takes the same value under any of its names; two names that differ are refused.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        inner = values.get("text_config", {})
        if not isinstance(inner, Mapping):
            raise FamilyError(f"{path}: text_config is no object")
        joined = {**values, **inner}
        own = joined.get("engram_config") or {}
        if not isinstance(own, Mapping):
            raise FamilyError(f"{path}: engram_config is no object")
        super().__init__(path, {**joined, **own})
        kinds = (values.get("model_type"), inner.get("model_type"), own.get("model_type"))
        self.model_types = [kind for kind in kinds if isinstance(kind, str)]

    @classmethod
    def read(cls, folder: Path) -> Config:
        """Of a checkpoint folder: config.json, the engram_config.json of a memory alone, or both."""
        path, own = folder / NAME, folder / OWN_NAME
        if not own.is_file():
            return cls.parse(path, _bytes(path))
        return cls.parse_own(own, _bytes(own), _object(path, _bytes(path)) if path.is_file() else {})

    @classmethod
    def parse(cls, path: Path, raw: bytes) -> Config:
        """Of a config.json's bytes; `path` names it in what is refused."""
        return cls(path, _object(path, raw))

    @classmethod
    def parse_own(cls, path: Path, raw: bytes, beside: Mapping[str, Any]) -> Config:
        """Of an engram_config.json's bytes, and of the config.json beside it."""
        return cls(path, {**beside, "engram_config": {"model_type": "engram", **_object(path, raw)}})


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise FamilyError(f"{path} has {path.stat().st_size:,} bytes, no configuration is that large")
        return path.read_bytes()
    except OSError as wrong:
        raise FamilyError(
            f"{path} cannot be read: {wrong.strerror}", hint="the configuration says what the tensors mean"
        ) from None


def _object(path: Path, raw: bytes) -> dict[str, Any]:
    """What a file of JSON holds."""
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as wrong:
        raise FamilyError(f"{path} is no JSON: {wrong}") from None
    if not isinstance(values, dict):
        raise FamilyError(f"{path} is no JSON object")
    return values
