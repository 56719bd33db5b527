"""The table file: what its bytes are and how it is written; FORMAT.md specifies it, mapped.py reads rows from it.

Shape letters: N rows, D width (values a row), K bytes a row, P pages of 4096 bytes, R rows a page.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from engram import EngramError, Progress
from engram.builders.atomic import sync_path
from engram.kernels import dispatch
from engram.kernels.codecs import Bytes, Codec, CodecError, Floats, find_codec
from engram.quantize.write_behind import BLOCK_PAGES, PageSink, forget, write_at
from engram.quantize.write_behind import PAGE as PAGE

FORMAT = "engram-rows"
VERSION = 2
_LONGEST_HEADER = 1 << 20
_MOST_ROWS = 1 << 48
_FIELDS = ("format", "version", "codec", "codec_version", "width", "rows", "layer")


class RowStoreError(EngramError):
    """A table file that is missing, damaged, of another version, or not the one asked for."""


@dataclass(frozen=True)
class Geometry:
    """Everything that a table file's header says, and the places that follow from it."""

    codec: Codec
    rows: int
    width: int
    layer: int

    def __post_init__(self) -> None:
        """Refuse what the format cannot hold."""
        for name, value, least, most in (("rows", self.rows, 1, _MOST_ROWS), ("width", self.width, 1, PAGE),
                                         ("layer", self.layer, 0, 1 << 31)):  # fmt: skip
            if not least <= value <= most:
                raise RowStoreError(f"table field {name} {value} must lie within {least} and {most}")
        if self.row_bytes > PAGE:
            raise RowStoreError(
                f"a row of width {self.width} takes {self.row_bytes} bytes in codec {self.codec.name!r}; "
                f"no row may cross a page of {PAGE} bytes",
                hint="use a codec with smaller rows, or a layout with a smaller head_dim",
            )

    @property
    def row_bytes(self) -> int:
        """K."""
        return self.codec.row_bytes(self.width)

    @property
    def rows_per_page(self) -> int:
        """R: row i lies on page i // R, at byte i % R * K of it."""
        return PAGE // self.row_bytes

    @property
    def pages(self) -> int:
        """P."""
        return -(-self.rows // self.rows_per_page)

    @property
    def header(self) -> bytes:
        """The file up to its first page: length, JSON, spaces. A function of the fields alone."""
        fields = (FORMAT, VERSION, self.codec.name, self.codec.version, self.width, self.rows, self.layer)
        body = self.pages * PAGE
        end = body + 4 * (self.pages + 1)  # a checksum for each page, then one for the header
        text = json.dumps(
            {
                "__metadata__": {name: str(value) for name, value in zip(_FIELDS, fields, strict=True)},
                "rows": {"dtype": "U8", "shape": [self.pages, PAGE], "data_offsets": [0, body]},
                "page_crc32": {"dtype": "U32", "shape": [self.pages + 1], "data_offsets": [body, end]},
            },
            separators=(",", ":"),
        ).encode("ascii")
        text += b" " * (-(8 + len(text)) % PAGE)
        return len(text).to_bytes(8, "little") + text

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + self.pages * (PAGE + 4) + 4

    def page_rows(self, page: int) -> tuple[int, int]:
        """First row of a page and the row after its last."""
        return page * self.rows_per_page, min((page + 1) * self.rows_per_page, self.rows)


def read_geometry(handle: int, path: Path) -> Geometry:
    """Read and check the header of an opened table file against the specification and the file's size.

    Raises RowStoreError for anything that FORMAT.md tells a reader to refuse.
    """
    size = os.fstat(handle).st_size
    if size < 8:
        raise _refused(path, f"has {size} bytes, too few for a header", hint="it was truncated: copy it again")
    length = int.from_bytes(_read(handle, 8, 0, path), "little")
    if not 2 <= length <= min(_LONGEST_HEADER, size - 8) or (8 + length) % PAGE:
        raise _refused(path, f"states a header of {length} bytes, which no table file of {size} bytes has")
    text = _read(handle, length, 8, path)
    fields = _fields(text, path)
    codec_version = _number(fields["codec_version"], "codec_version", path)
    numbers = {name: _number(fields[name], name, path) for name in ("rows", "width", "layer")}
    try:
        geometry = Geometry(find_codec(fields["codec"], codec_version), **numbers)
    except (CodecError, RowStoreError) as wrong:
        raise _refused(path, f"cannot be read: {wrong}", hint=wrong.hint) from None
    if geometry.header != length.to_bytes(8, "little") + text:
        raise _refused(path, "has a header that does not follow from its own fields", hint="it was altered")
    if size != geometry.file_bytes:
        kind = "truncated" if size < geometry.file_bytes else "longer than its header says"
        raise _refused(
            path, f"has {size} bytes, its header asks for {geometry.file_bytes}: it is {kind}", hint="copy it again"
        )
    if zlib.crc32(geometry.header) != int.from_bytes(_read(handle, 4, size - 4, path), "little"):
        raise _refused(path, "has a header that does not match its checksum", hint="it was altered: copy it again")
    return geometry


def _fields(text: bytes, path: Path) -> dict[str, str]:
    """The metadata strings of a header: exactly those of this version."""
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
        fields = header["__metadata__"]
        known = fields["format"], fields["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _refused(
            path, "has no header of a table file", hint="it is another kind of file, or it was altered"
        ) from None
    if known[0] != FORMAT:
        raise _refused(path, f"has format {known[0]!r}, expected {FORMAT!r}", hint="it is another kind of file")
    if known[1] != str(VERSION):
        raise _refused(
            path, f"has format version {known[1]!r}, this release reads {VERSION}",
            hint="quantize and export again from the float checkpoint, or use the release of engram that wrote it",
        )  # fmt: skip
    if set(fields) != set(_FIELDS) or not all(isinstance(value, str) for value in fields.values()):
        raise _refused(path, f"has the fields {sorted(fields)}, version {VERSION} has {sorted(_FIELDS)}")
    return dict(fields)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def _number(text: str, name: str, path: Path) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]{0,18}", text):
        raise _refused(path, f"has field {name} {text[:40]!r}, which is not a decimal number")
    return int(text)


def _read(handle: int, count: int, offset: int, path: Path) -> bytes:
    try:
        data = os.pread(handle, count, offset)
    except OSError as wrong:
        raise _refused(path, f"cannot be read: {wrong.strerror}") from None
    if len(data) != count:
        raise _refused(path, f"ends within its header, at byte {offset + len(data)}", hint="copy it again")
    return data


def _refused(path: Path, what: str, hint: str = "") -> RowStoreError:
    return RowStoreError(f"table file {path} {what}", hint=hint)


@dataclass(frozen=True)
class TableFile:
    """What a manifest records of a table file. `seal` is the SHA-256 of header and checksums, without the pages."""

    codec: str
    codec_version: int
    rows: int
    width: int
    bytes: int
    sha256: str
    seal: str


class RowWriter:
    """Writes one table file front to back in bounded memory; nothing appears under `path` before all of it is on disk.

    Use as a context manager; `append` encoded rows until there are `rows` of them. The file is built under
    `path` + ".partial" in the same folder, flushed, and renamed when the block ends; when it fails, it is removed.

    Hashing and writing go on behind `append`. To go on after a kill: call `sync` now and then and note `count`
    somewhere durable; a later writer of the same table with `resume=count` begins there, if what the file holds up to
    there has its checksums, and with 0 rows if not: look at its `count`. With `keep`, an error that is no EngramError
    (a full disk, Ctrl-C) leaves the unfinished file for that.
    """

    def __init__(
        self, path: Path, rows: int, width: int, codec: Codec, layer: int, *, resume: int = 0, keep: bool = False
    ) -> None:
        self.path, self.geometry = path, Geometry(codec, rows, width, layer)
        self.table_file: TableFile | None = None
        self.count = 0
        self._partial = path.with_name(path.name + ".partial")
        self._resume, self._keep = resume, keep
        self._pages = self._waiting = 0  # pages handed to the sink, rows in the block behind them

    def __enter__(self) -> Self:
        geometry = self.geometry
        begin = len(geometry.header)
        again = self._resume > 0 and self._partial.exists()
        self._file = self._partial.open("r+b" if again else "w+b", buffering=0)
        self._sink = PageSink(self._file.fileno(), begin, begin + geometry.pages * PAGE)
        self._take_block()
        try:
            self._sink.sha256.update(geometry.header)
            if again and not self._take_over(self._resume):
                self._sink.sha256 = hashlib.sha256(geometry.header)
                self._file.truncate(0)
                again = False
            if not again:
                write_at(self._file.fileno(), geometry.header, 0)
        except BaseException:
            self._leave(keep=True)
            raise
        return self

    def _take_block(self) -> None:
        geometry = self.geometry
        self._block = self._sink.take()
        packed = geometry.rows_per_page * geometry.row_bytes
        self._slots = self._block[:, :packed].reshape(BLOCK_PAGES, geometry.rows_per_page, -1)
        assert np.shares_memory(self._slots, self._block)

    def _take_over(self, rows: int) -> bool:
        """Go on behind the first `rows` rows of an unfinished file; False where they are not those that were synced."""
        geometry, handle = self.geometry, self._file.fileno()
        header, begin = geometry.header, len(geometry.header)
        if rows > geometry.rows or os.pread(handle, begin, 0) != header:
            return False
        pages = -(-rows // geometry.rows_per_page)
        for first in range(0, pages, BLOCK_PAGES):
            found = self._block[: min(BLOCK_PAGES, pages - first)]
            sums = np.zeros(len(found), dtype="<u4")
            read = os.preadv(handle, [found.data], begin + first * PAGE)
            read += os.preadv(handle, [sums.data], begin + geometry.pages * PAGE + 4 * first)
            if read != found.nbytes + sums.nbytes or (dispatch.ops().crc32_pages(found) != sums).any():
                return False
            whole = min(len(found), rows // geometry.rows_per_page - first)
            self._sink.sha256.update(found[:whole].data)
            forget(handle, begin + first * PAGE, found.nbytes)
            if whole < len(found):  # the last page is not full: it is put again
                self._block[0] = found[whole].copy()
        self.count = rows
        self._pages, self._waiting = divmod(rows, geometry.rows_per_page)
        return True

    def append(self, encoded_NK: Bytes) -> None:
        """Store the next rows; RowStoreError when there are more than announced."""
        if self.count + len(encoded_NK) > self.geometry.rows:
            raise RowStoreError(f"{self.path}: more rows arrive than the {self.geometry.rows} announced")
        per_page, capacity = self.geometry.rows_per_page, BLOCK_PAGES * self.geometry.rows_per_page
        self.count += len(encoded_NK)
        while len(encoded_NK):
            page, slot = divmod(self._waiting, per_page)
            taken = encoded_NK[: capacity - self._waiting]
            if slot or len(taken) < per_page:  # into one page
                taken = taken[: per_page - slot]
                self._slots[page, slot : slot + len(taken)] = taken
            else:
                taken = taken[: len(taken) // per_page * per_page]
                self._slots[page : page + len(taken) // per_page] = taken.reshape(-1, *self._slots.shape[1:])
            self._waiting += len(taken)
            encoded_NK = encoded_NK[len(taken) :]
            if self._waiting == capacity:
                self._flush()

    def _flush(self) -> None:
        """Hand over the pages that wait, the last one with zeros behind its rows."""
        count = -(-self._waiting // self.geometry.rows_per_page)
        self._clear_behind()
        self._sink.put(self._block, count, self._pages)
        self._pages += count
        self._waiting = 0
        self._take_block()

    def _clear_behind(self) -> None:
        page, slot = divmod(self._waiting, self.geometry.rows_per_page)
        if slot:
            self._slots[page, slot:] = 0

    def sync(self) -> None:
        """Have all rows that were appended on the disk, together with their checksums."""
        full, slot = divmod(self._waiting, self.geometry.rows_per_page)
        self._clear_behind()
        if full:
            last = self._block[full].copy() if slot else None
            self._sink.put(self._block, full, self._pages)
            self._pages, self._waiting = self._pages + full, slot
            self._take_block()
            if last is not None:
                self._block[0] = last
        if slot:
            self._sink.put(self._block, 1, self._pages, final=False)
        self._sink.drain()
        os.fsync(self._file.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keep = self._keep and error is not None and not isinstance(error, EngramError)
        try:
            if error is None:
                self._finish()
        except BaseException as wrong:
            keep = self._keep and not isinstance(wrong, EngramError)
            raise
        finally:
            self._leave(keep=keep)

    def _leave(self, *, keep: bool) -> None:
        self._sink.close()
        self._file.close()
        if not keep:
            self._partial.unlink(missing_ok=True)

    def _finish(self) -> None:
        geometry = self.geometry
        if self.count != geometry.rows:
            raise RowStoreError(f"{self.path}: {self.count} rows arrived of the {geometry.rows} announced")
        if self._waiting:
            self._flush()
        self._sink.drain()
        write_at(self._file.fileno(), zlib.crc32(geometry.header).to_bytes(4, "little"), geometry.file_bytes - 4)
        seal = hashlib.sha256(geometry.header)
        self._file.seek(len(geometry.header) + geometry.pages * PAGE)
        while block := self._file.read(1 << 20):
            seal.update(block)
            self._sink.sha256.update(block)
        os.fsync(self._file.fileno())
        self._partial.rename(self.path)
        sync_path(self.path.parent)
        self.table_file = TableFile(
            geometry.codec.name, geometry.codec.version, geometry.rows, geometry.width, geometry.file_bytes,
            self._sink.sha256.hexdigest(), seal.hexdigest(),
        )  # fmt: skip


def write_table(
    path: Path,
    blocks: Iterable[Floats],
    *,
    rows: int,
    width: int,
    codec: Codec,
    layer: int,
    progress: Progress | None = None,
) -> TableFile:
    """Encode float32 blocks [n, D] one after another into a table file.

    Raises CodecError for a value that is not finite, RowStoreError where the blocks hold other than `rows` rows.
    """
    with RowWriter(path, rows, width, codec, layer) as writer:
        done = 0
        with (progress or Progress()).task(f"layer {layer} as {codec.name}", rows, "rows") as task:
            for block in blocks:
                writer.append(dispatch.ops().encode(codec, block, table=f"layer {layer}", first_row=done, threads=0))
                done += len(block)
                task.advance(len(block))
    assert writer.table_file is not None
    return writer.table_file
