"""The extent map: a small file that says where the rows of a table lie in foreign files, which stay as they are.

FORMAT.md section 1.6 specifies it; extent_writer.py makes it, extent_table.py reads through it. Shape letters:
X extents, B blocks, K bytes a row.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from engram.builders.tensor_files import TensorFileError, read_header
from engram.kernels.codecs import Codec, CodecError, find_codec
from engram.quantize.page_reader import Ints, Run
from engram.quantize.row_store import PAGE, Geometry, RowStoreError

FORMAT = "engram-extents"
VERSION = 1
SUFFIX = ".extents.safetensors"
_FIELDS = ("format", "version", "codec", "codec_version", "width", "rows", "layer", "parts", "files")
_MOST_EXTENTS, _LONGEST_HEADER = 1 << 16, 1 << 24


class Source(NamedTuple):
    """Rows in a file: row i is the `bytes` bytes at offset + i * stride."""

    path: Path
    offset: int
    stride: int
    bytes: int
    rows: int


class Extent(NamedTuple):
    """One line of the map: rows of one part of the table in one file."""

    part: int
    file: int
    first_row: int
    rows: int
    offset: int
    stride: int


@dataclass(frozen=True)
class ExtentMap:
    """Everything that an extent map says but the checksums of the blocks."""

    codec: Codec
    rows: int
    width: int
    layer: int
    parts: Sequence[int]  # bytes of each part of a row
    files: Sequence[tuple[str, int]]  # path and size of each file
    extents: Sequence[Extent]

    def __post_init__(self) -> None:
        """Refuse what the format cannot hold."""
        geometry = Geometry(self.codec, self.rows, self.width, self.layer)
        if not 1 <= len(self.parts) <= 2 or min(self.parts) < 1 or sum(self.parts) != geometry.row_bytes:
            raise RowStoreError(
                f"parts of {list(self.parts)} bytes do not make a row of {geometry.row_bytes} bytes, as codec "
                f"{self.codec.name!r} has it at width {self.width}",
                hint="one part for each tensor, in the order of the codec's bytes; two at most",
            )
        if not 1 <= len(self.extents) <= _MOST_EXTENTS:
            raise RowStoreError(f"{len(self.extents)} extents; a map has 1 to {_MOST_EXTENTS}")
        if list(self.extents) != sorted(self.extents, key=lambda e: (e.part, e.first_row)):
            raise RowStoreError("the extents are not in the order of part and row")
        for part, size in enumerate(self.parts):
            reached = 0
            for e in self.extents:
                if e.part != part:
                    continue
                if e.first_row != reached or e.rows < 1:
                    raise RowStoreError(f"part {part} has rows from {e.first_row} on where row {reached} should follow")
                if not 0 <= e.file < len(self.files) or e.offset < 0 or e.stride < size or e.stride > 1 << 40:
                    raise RowStoreError(f"part {part} has an extent that cannot be: {tuple(e)}")
                if e.offset + (e.rows - 1) * e.stride + size > self.files[e.file][1]:
                    raise RowStoreError(f"part {part} reaches beyond the end of {self.files[e.file][0]}")
                reached += e.rows
            if reached != self.rows:
                raise RowStoreError(f"part {part} has {reached} rows, the table {self.rows}")
        if {e.part for e in self.extents} != set(range(len(self.parts))):
            raise RowStoreError("an extent belongs to a part that the map does not have")

    def span(self, extent: Extent) -> tuple[int, int]:
        """First block of the file that an extent touches, and the block after its last."""
        end = extent.offset + (extent.rows - 1) * extent.stride + self.parts[extent.part]
        return extent.offset // PAGE, -(-end // PAGE)

    @property
    def runs(self) -> list[Run]:
        """The blocks of the files that extents touch, file by file, ascending; what touches or overlaps is one run."""
        runs: list[Run] = []
        for file, first, end in sorted((e.file, *self.span(e)) for e in self.extents):
            last = runs[-1] if runs else None
            if last is not None and last.file == file and first <= last.first_block + last.blocks:
                runs[-1] = last._replace(blocks=max(last.blocks, end - last.first_block))
            else:
                runs.append(Run(file, first, end - first, 0))
        firsts = np.cumsum([0, *(run.blocks for run in runs)]).tolist()
        return [run._replace(first_sum=first) for run, first in zip(runs, firsts, strict=False)]

    @property
    def blocks(self) -> int:
        """B."""
        return sum(run.blocks for run in self.runs)

    @property
    def head(self) -> bytes:
        """The file up to the checksums: length, JSON, spaces, extents. A function of the fields alone."""
        fields = (
            FORMAT, VERSION, self.codec.name, self.codec.version, self.width, self.rows, self.layer,
            json.dumps(list(self.parts), separators=(",", ":")),
            json.dumps([list(file) for file in self.files], separators=(",", ":")),
        )  # fmt: skip
        body = 48 * len(self.extents)
        text = json.dumps(
            {
                "__metadata__": {name: str(value) for name, value in zip(_FIELDS, fields, strict=True)},
                "extents": {"dtype": "I64", "shape": [len(self.extents), 6], "data_offsets": [0, body]},
                "block_crc32": {
                    "dtype": "U32", "shape": [self.blocks + 1], "data_offsets": [body, body + 4 * (self.blocks + 1)]
                },
            },
            separators=(",", ":"),
        ).encode("ascii")  # fmt: skip
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + np.array(self.extents, dtype="<i8").tobytes()

    def block_rows(self, number: int) -> tuple[Run, int, int, int]:
        """Of the block with this checksum: its run, its number in the file, the first row that touches it, the last."""
        run = next(run for run in self.runs if run.first_sum <= number < run.first_sum + run.blocks)
        block = run.first_block + number - run.first_sum
        rows: list[int] = []
        for e in self.extents:
            size = self.parts[e.part]
            first = max(0, -(-(block * PAGE - e.offset - size + 1) // e.stride))
            last = min(e.rows - 1, ((block + 1) * PAGE - 1 - e.offset) // e.stride)
            if e.file == run.file and first <= last:
                rows += [e.first_row + first, e.first_row + last]
        return run, block, min(rows, default=0), max(rows, default=0)


def tensor_source(path: Path, name: str) -> Source:
    """A tensor of a safetensors file: its first dimension counts rows. Raises RowStoreError where there is none."""
    try:
        tensor = read_header(path)[name]
    except (TensorFileError, KeyError) as wrong:
        why = f": {wrong}" if isinstance(wrong, TensorFileError) else ""
        raise RowStoreError(f"{path} is no safetensors file with rows in a tensor {name!r}{why}") from None
    rows = tensor.shape[0] if tensor.shape else 0
    if not rows or not tensor.bytes:
        raise RowStoreError(f"{path} is no safetensors file with rows in a tensor {name!r}")
    size = tensor.bytes // rows
    return Source(path, tensor.offset, size, size, rows)


def read_map(handle: int, path: Path) -> ExtentMap:
    """Read and check an opened extent map, all but its checksums of blocks. Raises RowStoreError for any deviation."""
    size = os.fstat(handle).st_size
    length = int.from_bytes(os.pread(handle, 8, 0), "little") if size >= 8 else 0
    if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
        raise _refused(path, f"states a header of {length} bytes, it has {size} in all", "copy it again")
    try:
        header = json.loads(os.pread(handle, length, 8))
        fields = dict(header["__metadata__"])
        count = int(header["extents"]["shape"][0])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        hint = "it is another kind of file, or it was altered"
        raise _refused(path, "has no header of an extent map", hint) from None
    if fields.get("format") != FORMAT or fields.get("version") != str(VERSION):
        found = fields.get("format"), fields.get("version")
        raise _refused(path, f"has format and version {found}, this release reads {(FORMAT, str(VERSION))}", "")
    if not 1 <= count <= _MOST_EXTENTS or 8 + length + 48 * count > size:
        raise _refused(path, f"states {count} extents, which do not fit in it", "copy it again")
    lines: Ints = np.frombuffer(os.pread(handle, 48 * count, 8 + length), "<i8").reshape(count, 6)
    try:
        extent_map = ExtentMap(
            find_codec(fields["codec"], int(fields["codec_version"])), int(fields["rows"]), int(fields["width"]),
            int(fields["layer"]), [int(part) for part in json.loads(fields["parts"])],
            [(str(name), int(bytes_)) for name, bytes_ in json.loads(fields["files"])],
            [Extent(*line) for line in lines.tolist()],
        )  # fmt: skip
        head = extent_map.head
    except (CodecError, RowStoreError) as wrong:
        raise _refused(path, f"cannot be read: {wrong}", wrong.hint) from None
    except (ValueError, KeyError, TypeError) as wrong:
        raise _refused(path, f"has a field that is missing or of the wrong type: {wrong!r}", "it was altered") from None
    if os.pread(handle, len(head), 0) != head:
        raise _refused(path, "has a header that does not follow from its own fields", "it was altered")
    wanted = len(head) + 4 * (extent_map.blocks + 1)
    if size != wanted:
        kind = "truncated" if size < wanted else "longer"
        raise _refused(path, f"has {size} bytes, its header asks for {wanted}: it is {kind}", "copy it again")
    if zlib.crc32(head) != int.from_bytes(os.pread(handle, 4, size - 4), "little"):
        raise _refused(path, "does not match its checksum", "it was altered: copy it again")
    return extent_map


def _refused(path: Path, what: str, hint: str) -> RowStoreError:
    return RowStoreError(f"extent map {path} {what}", hint=hint)


def is_map(name: str) -> bool:
    """Whether a manifest's file name is an extent map's."""
    return PurePosixPath(name).name.endswith(SUFFIX)
