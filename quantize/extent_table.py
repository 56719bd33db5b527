"""Rows of foreign files through an extent map: the methods of a mapped table, nothing copied.

Shape letters: N rows, K bytes a row.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from engram.kernels.codecs import Bytes
from engram.quantize.extents import Extent, ExtentMap, read_map
from engram.quantize.mapped import PagedTable, check_expected
from engram.quantize.page_reader import File, Places, Segment, Sums
from engram.quantize.row_store import PAGE, RowStoreError
from engram.quantize.row_table import VERIFY

_CHUNK = 1 << 22  # bytes of a file that `blocks` reads at a time


class ExtentTable(PagedTable):
    """A table whose rows lie in files of others (FORMAT.md section 1.6), one checksum for every 4096 bytes of those."""

    def __init__(
        self, path: Path, handles: list[int], paths: list[Path], extent_map: ExtentMap, verify: str, io: str
    ) -> None:
        self.extent_map, self._paths = extent_map, [*paths, path]
        self._runs = extent_map.runs
        self.pages, self._sums = extent_map.blocks, len(extent_map.head)
        sizes = [*(size for _, size in extent_map.files), self._sums + 4 * (self.pages + 1)]
        self.file_bytes = self.pages * PAGE + sizes[-1]
        places = Places(
            files=[File(handle, size) for handle, size in zip(handles, sizes, strict=True)],
            runs=self._runs,
            parts=[
                [self._segment(e) for e in extent_map.extents if e.part == part]
                for part in range(len(extent_map.parts))
            ],
            rows=extent_map.rows,
            sums=Sums(len(paths), self._sums, self.pages),
        )
        super().__init__(
            path, handles, places, codec=extent_map.codec, rows=extent_map.rows, width=extent_map.width,
            layer=extent_map.layer, verify=verify, io=io,
        )  # fmt: skip

    def _segment(self, e: Extent) -> Segment:
        first, _ = self.extent_map.span(e)
        run = next(
            i for i, r in enumerate(self._runs)
            if r.file == e.file and r.first_block <= first < r.first_block + r.blocks
        )  # fmt: skip
        return Segment(e.first_row, e.rows, run, e.offset, e.stride, 1, self.extent_map.parts[e.part])

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        codec: str | None = None,
        rows: int | None = None,
        width: int | None = None,
        layer: int | None = None,
        verify: str = "first-touch",
        io: str = "auto",
    ) -> ExtentTable:
        """Open an extent map and its files after checking it, their sizes, and that it is the table expected.

        Raises RowStoreError for a map or a file that is missing, unreadable or damaged, and as MappedTable.open does.
        """
        if verify not in VERIFY:
            raise RowStoreError(f"verify {verify!r} is not known", hint="use one of: " + ", ".join(VERIFY))
        handles: list[int] = []
        try:
            handles.append(_open(path, "extent map"))
            extent_map = read_map(handles[0], path)
            check_expected(path, extent_map, codec=codec, rows=rows, width=width, layer=layer)
            paths = [path.parent / name for name, _ in extent_map.files]
            for i, (name, size) in enumerate(zip(paths, (size for _, size in extent_map.files), strict=True)):
                handles.insert(i, _open(name, f"table file (of extent map {path})"))
                if (found := os.fstat(handles[i]).st_size) != size:
                    raise RowStoreError(
                        f"table file {name} has {found} bytes, the extent map {path} says {size}",
                        hint="restore the file that was mapped, or map it again",
                    )
            table = cls(path, handles, paths, extent_map, verify, io)
        except BaseException:
            for handle in handles:
                os.close(handle)
            raise
        if verify == "open":
            try:
                table.verify_all()
            except BaseException:
                table.close()
                raise
        return table

    @property
    def paths(self) -> list[Path]:
        return self._paths

    def _refuse_block(self, number: int) -> NoReturn:
        run, block, first, last = self.extent_map.block_rows(number)
        raise RowStoreError(
            f"table file {self._paths[run.file]} (layer {self.layer}) is damaged: page {block}, rows {first} to "
            f"{last}, does not match its checksum in the extent map {self.path}",
            hint="restore the file that was mapped, or map it again",
        )

    def blocks(self) -> Iterator[tuple[int, Bytes]]:
        sizes = self.extent_map.parts
        widest = max(e.stride for e in self.extent_map.extents)
        count = max(1, _CHUNK // widest)
        for begin in range(0, self.rows, count):
            end = min(begin + count, self.rows)
            rows = np.empty((end - begin, self.row_bytes), dtype=np.uint8)
            for e in self.extent_map.extents:
                low, high = max(begin, e.first_row), min(end, e.first_row + e.rows)
                if low < high:
                    column, size = sum(sizes[: e.part]), sizes[e.part]
                    rows[low - begin : high - begin, column : column + size] = self._verified_rows(e, low, high)
            yield begin, rows

    def _verified_rows(self, e: Extent, low: int, high: int) -> Bytes:
        """Rows low … high of an extent, read beside the mapping; every block that they touch was compared."""
        size = self.extent_map.parts[e.part]
        start = e.offset + (low - e.first_row) * e.stride
        stop = e.offset + (high - 1 - e.first_row) * e.stride + size
        first, last = start // PAGE, -(-stop // PAGE)
        whole = self.extent_map.files[e.file][1]
        data = np.frombuffer(self._read(e.file, min(last * PAGE, whole) - first * PAGE, first * PAGE), np.uint8)
        run = self._places.runs[self._segment(e).run]
        number = run.first_sum + first - run.first_block
        sums = np.frombuffer(self._read(len(self._handles) - 1, 4 * (last - first), self._sums + 4 * number), "<u4")
        for i in range(last - first):
            if zlib.crc32(data[i * PAGE : (i + 1) * PAGE].data) != int(sums[i]):
                self._refuse_block(number + i)
        return np.ndarray((high - low, size), np.uint8, data, start - first * PAGE, (e.stride, 1))

    def seal(self) -> str:
        """SHA-256 of the extent map, whose checksums pin every byte of the rows."""
        digest, size = hashlib.sha256(), self._places.files[-1].bytes
        for offset in range(0, size, 1 << 20):
            digest.update(self._read(len(self._handles) - 1, min(1 << 20, size - offset), offset))
        return digest.hexdigest()


def _open(path: Path, what: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as wrong:
        raise RowStoreError(f"{what} {path} cannot be opened: {wrong.strerror}") from None
