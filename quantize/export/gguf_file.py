"""A GGUF written tensor by tensor: of each only a block is in memory. The pairs of another are copied as they are.

Layout: builders/gguf_header.py. Shapes here have the fastest dimension last; in the file it is the first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram import Progress, __version__
from engram.builders.atomic import check_replaceable
from engram.builders.gguf_header import ARRAY, GGML, STRING, GgufHeaderError, read_metadata
from engram.builders.tensor_files import Tensor, TensorFiles, open_files
from engram.quantize.export.target import Converted, ExportError, TargetConfig, atomic_file, write_behind
from engram.quantize.source_parts import tensor_blocks

MARK = "engram.release"  # the key that says that a GGUF is an export of ours
ALIGNMENT = "general.alignment"
_SPLIT = "split.count"
_VERSION = 3
_NUMBERS = {"u4": 4, "i4": 5, "u8": 10}  # numpy's name → GGUF's type number
_TYPES = {name: (number, values, size) for number, (name, values, size) in GGML.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to write: `kind` is ggml's name of its type; `blocks` gives its bytes, in order."""

    name: str
    kind: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[memoryview | bytes]]

    @property
    def bytes(self) -> int:
        """Of all its values."""
        _, values, size = _TYPES[self.kind]
        return math.prod(self.shape) // values * size


def open_backbone(path: Path) -> TensorFiles:
    """The GGUF whose other tensors are copied; ExportError where it is none, or a part of one."""
    if path.suffix != ".gguf":
        raise ExportError(f"--backbone {path} is no GGUF", hint="give the model's .gguf file")
    files = open_files(path)
    if (parts := files.metadata.get(_SPLIT, 0)) not in (0, 1):
        raise ExportError(f"{path} is one of {parts} parts", hint="join them: llama-gguf-split --merge")
    return files


def copied(name: str, tensor: Tensor) -> Entry:
    """A tensor of another GGUF, as it is."""
    return Entry(name, tensor.dtype, tensor.shape, lambda: tensor_blocks(tensor))


def table_entry(held: Converted, layer: int, name: str, kind: str, shape: tuple[int, ...]) -> Entry:
    """A layer's rows, one after another."""
    return Entry(name, kind, shape, lambda: (rows.data for _, rows in held.tables[layer].blocks()))


def text(key: str, value: str) -> bytes:
    """A pair of a string."""
    return _string(key) + struct.pack("<I", STRING) + _string(value)


def number(key: str, value: int) -> bytes:
    """A pair of an unsigned 32-bit number."""
    return _string(key) + struct.pack("<II", _NUMBERS["u4"], value)


def numbers(key: str, values: Any, kind: str) -> bytes:
    """A pair of an array: `kind` is "u4", "i4" or "u8"."""
    array = np.asarray(values, dtype="<" + kind)
    return _string(key) + struct.pack("<IIQ", ARRAY, _NUMBERS[kind], len(array)) + array.tobytes()


def write_gguf(
    config: TargetConfig, pairs: dict[str, bytes], tensors: Sequence[Entry], alignment: int, progress: Progress
) -> int:  # fmt: skip
    """Write `config.out` whole or not at all, after `check_file`; its bytes."""
    pairs = pairs | {ALIGNMENT: number(ALIGNMENT, alignment), MARK: text(MARK, __version__)}
    counts = struct.pack("<4sIQQ", b"GGUF", _VERSION, len(tensors), len(pairs))
    parts, places, reached = [counts, *pairs.values()], [], 0
    for tensor in tensors:
        dimensions = len(tensor.shape)
        parts.append(_string(tensor.name) + struct.pack(f"<I{dimensions}Q", dimensions, *tensor.shape[::-1]))
        parts.append(struct.pack("<IQ", _TYPES[tensor.kind][0], reached))
        places.append(reached)
        reached += -(-tensor.bytes // alignment) * alignment
    header = b"".join(parts)
    begin = -(-len(header) // alignment) * alignment
    with (
        atomic_file(config.out) as file,
        progress.task(f"write {config.out.name}", sum(tensor.bytes for tensor in tensors), "B") as task,
    ):
        write_behind(file, header, 0)
        file.truncate(begin + reached)
        for tensor, place in zip(tensors, places, strict=True):
            at = begin + place
            for block in tensor.blocks():
                write_behind(file, block, at)
                length = len(block) if isinstance(block, bytes) else block.nbytes
                at += length
                task.advance(length)
            if at != begin + place + tensor.bytes:
                raise ExportError(f"tensor {tensor.name!r} came to {at - begin - place:,} bytes, not {tensor.bytes:,}")
    return begin + reached


def check_file(config: TargetConfig) -> None:
    """Refuse an `out` that exists, or with `force` one that is no export of ours or a source of this one."""
    out = config.out
    if out.suffix != ".gguf":
        raise ExportError(f"--out {out} is no name of a GGUF", hint="give a file name that ends in .gguf")
    if not out.exists() or not config.force:
        check_replaceable(out, force=False, error=ExportError)
        return
    if config.backbone is not None and config.backbone.exists() and out.samefile(config.backbone):
        raise ExportError(f"--out {out} is the backbone that is read", hint="choose another --out")
    if out.is_symlink() or not out.is_file() or not _is_ours(out):
        raise ExportError(f"{out} is no GGUF of engram, --force does not replace it", hint="remove it yourself")


def _is_ours(path: Path) -> bool:
    try:
        return MARK in read_metadata(path)
    except GgufHeaderError:
        return False


def _string(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data
