"""The metadata and the tensor list of a GGUF file, read with every length checked against the file.

A GGUF comes from strangers: a length that lies must end in an error, not in a loop over 2^60 elements. Layout (GGUF 2
and 3, little-endian): magic, u32 version, u64 tensors, u64 pairs, then pairs of string key, u32 type, value, then
tensors: string name, u32 dimensions, u64 each (the fastest first), u32 type, u64 offset.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from engram import EngramError

STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
MOST_PAIRS = MOST_TENSORS = 1 << 16
MOST_DIMENSIONS = 4


_Found = TypeVar("_Found")


class GgufHeaderError(EngramError):
    """A file that is not GGUF, or whose header contradicts itself."""


class _Cursor:
    """A position in the mapped file that refuses to pass its end."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data, self.name, self.at = data, name, 0

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.data) - self.at:
            raise GgufHeaderError(
                f"{self.name}: {what} of {count} bytes at offset {self.at} runs past the end of the file "
                f"({len(self.data)} bytes)",
                hint="the file is truncated or altered; fetch it again",
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def unsigned(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def text(self, what: str) -> str:
        return self.take(self.unsigned(8, what), what).decode("utf-8", "replace")

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.text(key)
        if kind == ARRAY:
            return self.array(key)
        if kind not in SCALARS:
            raise GgufHeaderError(f"{self.name}: field {key!r} has value type {kind}, GGUF knows 0 to 12")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(dtype.itemsize, key), dtype)[0].item()

    def array(self, key: str) -> Any:
        kind, count = self.unsigned(4, key), self.unsigned(8, key)
        if kind == STRING:
            return self.texts(count, key)
        if kind not in SCALARS:
            raise GgufHeaderError(f"{self.name}: array {key!r} has element type {kind}, strings and numbers are read")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize, key), dtype)

    def texts(self, count: int, key: str) -> list[str]:
        if count * 8 > len(self.data) - self.at:
            raise GgufHeaderError(
                f"{self.name}: array {key!r} claims {count} strings, more than the file can hold",
                hint="the file is truncated or altered; fetch it again",
            )
        data, at, end, length = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        out = []
        for _ in range(count):
            size = length(data, at)[0] if at + 8 <= end else end
            if size > end - at - 8:
                raise GgufHeaderError(f"{self.name}: a string of array {key!r} runs past the end of the file")
            out.append(data[at + 8 : at + 8 + size].decode("utf-8", "replace"))
            at += 8 + size
        self.at = at
        return out


def read_metadata(path: Path) -> dict[str, Any]:
    """Key → value of a GGUF's header; strings, numbers, lists of strings, numpy arrays of numbers.

    Raises GgufHeaderError for a file that is missing, not GGUF, of an unknown version, or truncated.
    """
    return _mapped(path, lambda cursor: _read(cursor)[0])


def read_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Tensor name → (dimensions, the fastest first; ggml's type number). Raises as read_metadata."""
    return _mapped(path, _tensors)


def _mapped(path: Path, read: Callable[[_Cursor], _Found]) -> _Found:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read(_Cursor(data, path.name))
    except (OSError, ValueError) as wrong:  # ValueError: an empty file cannot be mapped
        raise GgufHeaderError(f"{path} cannot be read as GGUF: {wrong}") from None


def _tensors(cursor: _Cursor) -> dict[str, tuple[tuple[int, ...], int]]:
    _, count = _read(cursor)
    if count > MOST_TENSORS:
        raise GgufHeaderError(f"{cursor.name} claims {count} tensors, more than {MOST_TENSORS}")
    out: dict[str, tuple[tuple[int, ...], int]] = {}
    for _ in range(count):
        name, dimensions = cursor.text("a tensor's name"), cursor.unsigned(4, "a tensor's dimensions")
        if dimensions > MOST_DIMENSIONS:
            raise GgufHeaderError(f"{cursor.name}: tensor {name!r} claims {dimensions} dimensions, GGUF has up to 4")
        shape = tuple(cursor.unsigned(8, name) for _ in range(dimensions))
        out[name] = (shape, cursor.unsigned(4, name))
        cursor.unsigned(8, name)
    return out


def _read(cursor: _Cursor) -> tuple[dict[str, Any], int]:
    """The pairs, and how many tensors follow."""
    magic, version = cursor.take(4, "magic"), cursor.unsigned(4, "version")
    if magic != b"GGUF" or version not in (2, 3):
        raise GgufHeaderError(f"{cursor.name} begins with {magic!r} and version {version}, not GGUF 2 or 3")
    tensors = cursor.unsigned(8, "tensor count")
    pairs = cursor.unsigned(8, "pair count")
    if pairs > MOST_PAIRS:
        raise GgufHeaderError(f"{cursor.name} claims {pairs} metadata pairs, more than {MOST_PAIRS}")
    out: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text("a key")
        out[key] = cursor.value(cursor.unsigned(4, key), key)
    return out, tensors
