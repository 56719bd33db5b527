"""A published config.json, read key by key: what is missing, of the wrong type or told twice differently is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from engram import EngramError

NAME = "config.json"
_LARGEST = 1 << 24

T = TypeVar("T")


class FamilyError(EngramError):
    """A checkpoint that is of no known family, or that contradicts what its family says."""


class Config:
    """The keys of a config.json; those of `text_config` come first, as transformers reads them.

    `get(name, alias, …)` takes the same value under any of its names; two names that differ are refused.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        inner = values.get("text_config", {})
        if not isinstance(inner, Mapping):
            raise FamilyError(f"{path}: text_config is no object")
        self.values: dict[str, Any] = {**values, **inner}
        self.model_types = [v for v in (values.get("model_type"), inner.get("model_type")) if isinstance(v, str)]

    @classmethod
    def read(cls, folder: Path) -> Config:
        """Of a checkpoint folder."""
        path = folder / NAME
        try:
            if path.stat().st_size > _LARGEST:
                raise FamilyError(f"{path} has {path.stat().st_size:,} bytes, no configuration is that large")
            values = json.loads(path.read_bytes())
        except OSError as wrong:
            raise FamilyError(
                f"{path} cannot be read: {wrong.strerror}", hint="the configuration says what the tensors mean"
            ) from None
        except (ValueError, RecursionError) as wrong:
            raise FamilyError(f"{path} is no JSON: {wrong}") from None
        if not isinstance(values, dict):
            raise FamilyError(f"{path} is no JSON object")
        return cls(path, values)

    def number(self, *names: str, least: int = 0, default: int | None = None) -> int:
        """A whole number of at least `least`."""
        return self._get(names, lambda v: type(v) is int and least <= v < 1 << 62, f"a number from {least}", default)

    def numbers(self, *names: str, least: int = 0) -> tuple[int, ...]:
        """A list of at least one whole number."""

        def fits(value: Any) -> bool:
            whole = isinstance(value, list) and all(type(v) is int and least <= v < 1 << 62 for v in value)
            return whole and bool(value)

        return tuple(self._get(names, fits, f"a list of numbers from {least}", None))

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
