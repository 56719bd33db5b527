"""Rows of a published table where they lie: each as our codec reads it, values and scales side by side.

Shape letters: n rows of a block, K bytes a row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engram import EngramError
from engram.builders.families.family import Part, Table
from engram.builders.tensor_files import Tensor
from engram.kernels.codecs import Bytes, Codec, find_codec
from engram.quantize.extents import Source
from engram.quantize.page_reader import Ints
from engram.quantize.stream import AHEAD, BLOCK_BYTES, read_ahead
from engram.quantize.write_behind import forget

_FACTORS = {"F32": ("<f4", 4), "F16": ("<f2", 2), "BF16": ("<u2", 2)}


class ForeignError(EngramError):
    """A published table that our formats cannot hold, or that cannot be read to its end."""


@dataclass(frozen=True)
class ForeignRows:
    """A published table as rows of one of our codecs.

    `parts`: for each part of a row, in the order of the codec's bytes, the places that hold its rows one after another.
    """

    layer: int
    codec: Codec
    rows: int
    width: int
    parts: tuple[tuple[Source, ...], ...]

    @classmethod
    def of(cls, table: Table) -> ForeignRows:
        """Raises ForeignError for rows that no codec of ours reads, or whose shards are not there."""
        if table.absent:
            raise ForeignError(
                f"layer {table.layer}: rows are in files that are not here: {', '.join(table.absent)}",
                hint="fetch them; no other shard is needed for the tables",
            )
        codec = find_codec(_codec_name(table))
        parts = [tuple(_source(part, part.values) for part in table.parts)]
        if any(part.scales is not None for part in table.parts):
            parts.append(tuple(_source(part, part.scales) for part in table.parts if part.scales is not None))
        found = [sources[0].bytes for sources in parts]
        if sum(found) != codec.row_bytes(table.width):
            raise ForeignError(
                f"layer {table.layer}: rows have {' + '.join(map(str, found))} bytes, codec {codec.name!r} has "
                f"{codec.row_bytes(table.width)} at width {table.width}"
            )
        return cls(table.layer, codec, table.rows, table.width, tuple(parts))

    @property
    def row_bytes(self) -> int:
        """K."""
        return self.codec.row_bytes(self.width)

    def block_rows(self, rows_per_page: int = 1) -> int:
        """Rows to read at a time: about 4 MiB, whole pages of the file that is written."""
        return max(1, BLOCK_BYTES // (self.row_bytes * rows_per_page)) * rows_per_page

    def blocks(self, count: int, first: int = 0) -> Iterator[Bytes]:
        """Rows from `first` on, `count` at a time: uint8 [n, K], each valid until the next one is asked for.

        They are read ahead, and what was read is dropped from the page cache. ForeignError where a file ends too soon.
        """
        starts = range(first, self.rows, count)
        most = min(count, self.rows)
        ring = [np.empty((most, self.row_bytes), dtype=np.uint8) for _ in range(min(AHEAD, len(starts)))]
        scratch = [np.empty((most, sources[0].bytes), dtype=np.uint8) for sources in self.parts]
        return read_ahead(starts, ring, lambda start, block: self._read(start, block, scratch))

    def _read(self, start: int, block: Bytes, scratch: Sequence[Bytes]) -> Bytes:
        rows = block[: self.rows - start]
        if len(self.parts) == 1:
            _fill(rows, self.parts[0], start)
            return rows
        column = 0
        for sources, buffer in zip(self.parts, scratch, strict=True):
            part = buffer[: len(rows)]
            _fill(part, sources, start)
            rows[:, column : column + part.shape[1]] = part
            column += part.shape[1]
        return rows

    def read_rows(self, rows: Ints) -> Bytes:
        """Some rows, int64 [n] in any order, as they are stored: uint8 [n, K]. ForeignError as `blocks`."""
        out = np.empty((len(rows), self.row_bytes), dtype=np.uint8)
        for i, row in enumerate(rows.tolist()):
            self._read(row, out[i : i + 1], [np.empty((1, sources[0].bytes), np.uint8) for sources in self.parts])
        return out


def _fill(rows: Bytes, sources: Sequence[Source], start: int) -> None:
    """Read as many rows as there is place for, from row `start` of the part on."""
    first, end = 0, start + len(rows)
    for source in sources:
        low, high = max(start, first), min(end, first + source.rows)
        if low < high:
            _read_at(source, low - first, rows[low - start : high - start])
        first += source.rows


def _read_at(source: Source, row: int, rows: Bytes) -> None:
    """Consecutive rows of one file into contiguous memory."""
    left, offset = rows.reshape(-1).data, source.offset + row * source.stride
    begin = offset
    try:
        handle = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as wrong:
        raise ForeignError(f"{source.path} cannot be opened: {wrong.strerror}") from None
    try:
        while left:
            done = os.preadv(handle, [left], offset)
            if not done:
                raise ForeignError(f"{source.path} ends at byte {offset:,}, within its rows", hint="it was truncated")
            left, offset = left[done:], offset + done
        if len(rows) > 1:
            forget(handle, begin, offset - begin)
    except OSError as wrong:
        raise ForeignError(f"{source.path} cannot be read: {wrong.strerror}") from None
    finally:
        os.close(handle)


def _source(part: Part, tensor: Tensor) -> Source:
    size = tensor.bytes // part.rows
    return Source(tensor.file, tensor.offset, size, size, part.rows)


def _codec_name(table: Table) -> str:
    """Our codec's name, with the table's own factor where there is one."""
    if table.codec is None:
        raise ForeignError(
            f"layer {table.layer}: rows of {table.dtype} are no row codec of ours",
            hint="take a checkpoint or GGUF whose table is F32, BF16, FP8, Q8_0, Q4_0 or IQ4_NL",
        )
    if table.factor is None:
        return table.codec
    return f"{table.codec}:{_factor_bits(table.factor):08x}"


def _factor_bits(tensor: Tensor) -> int:
    """The fp32 bits of a table's one factor; exact from every dtype that it may have."""
    kind, size = _FACTORS[tensor.dtype]
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        raw = np.frombuffer(file.read(size), dtype=kind)
    value = (raw.astype("<u4") << 16).view("<f4") if tensor.dtype == "BF16" else raw.astype("<f4")
    if not np.isfinite(value[0]) or value[0] <= 0:
        raise ForeignError(f"{tensor.file}: the factor of a table is {value[0]}, it must be finite and above 0")
    return int(value.view("<u4")[0])
