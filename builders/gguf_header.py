"""The metadata and the tensor list of a GGUF file, read with every length checked against the file.

A GGUF comes from strangers: a length that lies must end in an error, not in a loop over 2^60 elements. Layout (GGUF 2
and 3, little-endian): magic, u32 version, u64 tensors, u64 pairs, then pairs of string key, u32 type, value, then
tensors: string name, u32 dimensions, u64 each (the fastest first), u32 type, u64 offset.
"""

from __future__ import annotations

import math
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
GGML = {  # type number → name, values of a block, bytes of a block
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
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


def read_places(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...], int, int]]]:
    """The metadata, and tensor name → (ggml's type, shape with the fastest dimension last, offset in the file, bytes).

    Raises as read_metadata, and for a tensor that lies outside the file or over another one.
    """
    return _mapped(path, _places)


def read_pairs(path: Path) -> dict[str, bytes]:
    """Key → the pair's own bytes (key, type, value), by which it can be written again. Raises as read_metadata."""
    return _mapped(path, _pairs)


def _mapped(path: Path, read: Callable[[_Cursor], _Found]) -> _Found:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read(_Cursor(data, path.name))
    except (OSError, ValueError) as wrong:  # ValueError: an empty file cannot be mapped
        raise GgufHeaderError(f"{path} cannot be read as GGUF: {wrong}") from None


def _places(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...], int, int]]]:
    metadata, count = _read(cursor)
    entries = _entries(cursor, count)
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or not 8 <= align <= 1 << 16 or align % 8:
        raise GgufHeaderError(f"{cursor.name}: general.alignment {align!r} is no multiple of 8 up to 65536")
    begin, size, out = -(-cursor.at // align) * align, len(cursor.data), {}
    for name, (shape, kind, offset) in entries.items():
        if kind not in GGML:
            raise GgufHeaderError(f"{cursor.name}: tensor {name!r} has the type {kind}, which is not known")
        type_name, values, block = GGML[kind]
        if not shape or shape[0] % values:
            raise GgufHeaderError(f"{cursor.name}: tensor {name!r} has rows of {shape[:1]}, {type_name} packs {values}")
        length = math.prod(shape) // values * block
        if offset % align or begin + offset + length > size:
            raise GgufHeaderError(
                f"{cursor.name}: tensor {name!r} of {type_name} {list(shape)} lies at {begin + offset:,} to "
                f"{begin + offset + length:,}, the file has {size:,} bytes and is aligned to {align}",
                hint="the file is truncated or altered; fetch it again",
            )
        out[name] = (type_name, shape[::-1], begin + offset, length)
    reached, last = begin, ""
    for name, (_, _, at, length) in sorted(out.items(), key=lambda item: (item[1][2], item[1][3])):
        if at < reached:
            raise GgufHeaderError(f"{cursor.name}: tensor {name!r} overlaps {last!r}")
        reached, last = at + length, name
    return metadata, out


def _tensors(cursor: _Cursor) -> dict[str, tuple[tuple[int, ...], int]]:
    _, count = _read(cursor)
    return {name: (shape, kind) for name, (shape, kind, _) in _entries(cursor, count).items()}


def _entries(cursor: _Cursor, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Tensor name → (dimensions, type number, offset in the data)."""
    if count > MOST_TENSORS:
        raise GgufHeaderError(f"{cursor.name} claims {count} tensors, more than {MOST_TENSORS}")
    out: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name, dimensions = cursor.text("a tensor's name"), cursor.unsigned(4, "a tensor's dimensions")
        if dimensions > MOST_DIMENSIONS:
            raise GgufHeaderError(f"{cursor.name}: tensor {name!r} claims {dimensions} dimensions, GGUF has up to 4")
        if name in out:
            raise GgufHeaderError(f"{cursor.name} names the tensor {name!r} twice")
        shape = tuple(cursor.unsigned(8, name) for _ in range(dimensions))
        out[name] = (shape, cursor.unsigned(4, name), cursor.unsigned(8, name))
    return out


def _pairs(cursor: _Cursor) -> dict[str, bytes]:
    begins: dict[str, int] = {}
    _read(cursor, begins)
    ends = [*list(begins.values())[1:], cursor.at]
    return {key: cursor.data[begin:end] for (key, begin), end in zip(begins.items(), ends, strict=True)}


def _read(cursor: _Cursor, begins: dict[str, int] | None = None) -> tuple[dict[str, Any], int]:
    """The pairs, and how many tensors follow; with `begins`, where each pair begins."""
    magic, version = cursor.take(4, "magic"), cursor.unsigned(4, "version")
    if magic != b"GGUF" or version not in (2, 3):
        raise GgufHeaderError(f"{cursor.name} begins with {magic!r} and version {version}, not GGUF 2 or 3")
    tensors = cursor.unsigned(8, "tensor count")
    pairs = cursor.unsigned(8, "pair count")
    if pairs > MOST_PAIRS:
        raise GgufHeaderError(f"{cursor.name} claims {pairs} metadata pairs, more than {MOST_PAIRS}")
    out: dict[str, Any] = {}
    for _ in range(pairs):
        begin = cursor.at
        key = cursor.text("a key")
        if begins is not None:
            if key in begins:
                raise GgufHeaderError(f"{cursor.name} has the key {key!r} twice")
            begins[key] = begin
        out[key] = cursor.value(cursor.unsigned(4, key), key)
    return out, tensors
