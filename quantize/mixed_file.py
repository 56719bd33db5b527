"""The files of a mixed table: the class map's bytes and a table file for each class; FORMAT.md section 1.7."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engram.builders.atomic import sync_path
from engram.quantize.class_map import BLOCK, CLASSES, MOST_ROWS, ClassMap, refused
from engram.quantize.row_store import PAGE, RowStoreError, TableFile

FORMAT = "engram-mixed"
VERSION = 1
CODEC, CODEC_VERSION = "mixed", 1  # what a manifest says in place of a codec
SUFFIX = ".mixed.safetensors"
RECORD = 32
_FIELDS = ("format", "version", "width", "rows", "layer", "classes")
_KINDS = ((str, type(None)), (int, type(None)), (int,), (str, type(None)))  # of a class's four values
_LONGEST_HEADER = 1 << 16


class ClassFile(NamedTuple):
    """What the map says of one class."""

    codec: str | None  # None: dropped, its rows read as zeros
    codec_version: int | None
    rows: int
    seal: str | None  # of its table file; None where it has none

    @property
    def stored(self) -> bool:
        """Whether it has a table file."""
        return self.codec is not None and self.rows > 0


@dataclass(frozen=True)
class MapHeader:
    """Everything that a class map says but its records."""

    width: int
    rows: int
    layer: int
    classes: Sequence[ClassFile]

    @property
    def bytes(self) -> bytes:
        """The file up to its records: length, JSON, spaces. A function of the fields alone."""
        listed = json.dumps([list(c) for c in self.classes], separators=(",", ":"))
        values = (FORMAT, VERSION, self.width, self.rows, self.layer, listed)
        blocks = -(-self.rows // BLOCK)
        end = blocks * RECORD
        text = json.dumps(
            {
                "__metadata__": {name: str(value) for name, value in zip(_FIELDS, values, strict=True)},
                "classes": {"dtype": "U8", "shape": [blocks, RECORD], "data_offsets": [0, end]},
                "crc32": {"dtype": "U32", "shape": [1], "data_offsets": [end, end + 4]},
            },
            separators=(",", ":"),
        ).encode("ascii")
        text += b" " * (-(8 + len(text)) % RECORD)
        return len(text).to_bytes(8, "little") + text

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.bytes) + -(-self.rows // BLOCK) * RECORD + 4

    def check(self) -> None:
        """RowStoreError for fields that the format does not allow."""
        for name, value, least, most in (("rows", self.rows, 1, MOST_ROWS), ("width", self.width, 1, PAGE),
                                         ("layer", self.layer, 0, 1 << 31)):  # fmt: skip
            if not least <= value <= most:
                raise RowStoreError(f"{name} {value} must lie within {least} and {most}")
        if not 1 <= len(self.classes) <= CLASSES:
            raise RowStoreError(f"{len(self.classes)} classes; a mixed table has 1 to {CLASSES}")
        for number, c in enumerate(self.classes):
            if (c.codec is None) != (c.codec_version is None) or c.stored != (c.seal is not None) or c.rows < 0:
                raise RowStoreError(f"class {number} of {c.rows} rows has codec {c.codec!r} and seal {c.seal!r}")
        if sum(c.rows for c in self.classes) != self.rows:
            raise RowStoreError(
                f"classes of {[c.rows for c in self.classes]} rows make no table of {self.rows} rows"
            )


def is_mixed(name: str) -> bool:
    """Whether a file name is a class map's."""
    return name.endswith(SUFFIX)


def map_name(layer: int) -> str:
    """Path of a layer's class map inside a checkpoint or package."""
    return f"tables/layer-{layer:02d}{SUFFIX}"


def part_name(map_name: str, number: int) -> str:
    """The file of a class, beside the map: layer-03.mixed.safetensors to layer-03.2.safetensors."""
    return f"{map_name.removesuffix(SUFFIX)}.{number}.safetensors"


def file_pieces(header: MapHeader, class_map: ClassMap) -> Iterator[bytes | memoryview]:
    """The bytes of a class map's file."""
    head, body = header.bytes, class_map.records.astype("<u8", copy=False)
    yield head
    yield body.reshape(-1).view(np.uint8).data
    yield zlib.crc32(body.reshape(-1).view(np.uint8).data, zlib.crc32(head)).to_bytes(4, "little")


def write_map(
    folder: Path, width: int, layer: int, class_map: ClassMap, codecs: Sequence[tuple[str, int] | None],
    made: Mapping[int, TableFile],
) -> dict[str, Any]:  # fmt: skip
    """Write the class map of a table whose classes were written into `folder`/tables; the table's manifest entry.

    `codecs` has the codec and version of each class, None where it is dropped; `made` the files of those that have one.
    """
    classes = [
        ClassFile(codec[0] if codec else None, codec[1] if codec else None, class_map.counts[n],
                  made[n].seal if n in made else None)
        for n, codec in enumerate(codecs)
    ]  # fmt: skip
    header = MapHeader(width, class_map.rows, layer, classes)
    header.check()
    name = map_name(layer)
    path = folder / name
    partial = path.with_name(path.name + ".partial")
    digest, size = hashlib.sha256(), 0
    try:
        with partial.open("wb") as file:
            for piece in file_pieces(header, class_map):
                file.write(piece)
                digest.update(piece)
                size += len(piece)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sync_path(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    parts = [
        {
            "class": n, "codec": c.codec, "codec_version": c.codec_version, "rows": c.rows, "seal": c.seal,
            "file": part_name(name, n) if c.stored else None, "bytes": made[n].bytes if c.stored else 0,
            "sha256": made[n].sha256 if c.stored else None,
        }
        for n, c in enumerate(classes)
    ]  # fmt: skip
    table = TableFile(CODEC, CODEC_VERSION, class_map.rows, width, size, digest.hexdigest(), digest.hexdigest())
    return {"file": name, **asdict(table), "parts": parts}


def read_map(path: Path) -> tuple[MapHeader, ClassMap]:
    """Read a class map whole and check everything that it says of itself.

    What is returned lies in memory: no later change of the file can change it. Raises RowStoreError for any deviation
    from FORMAT.md section 1.7.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise refused(path, f"states a header of {length} bytes, it has {size} in all", "copy it again")
            text = file.read(length)
            header = _header(text, path)
            wanted = len(header.bytes) + -(-header.rows // BLOCK) * RECORD + 4
            if header.bytes != length.to_bytes(8, "little") + text:
                raise refused(path, "has a header that does not follow from its own fields", "it was altered")
            if size != wanted:
                kind = "truncated" if size < wanted else "longer"
                raise refused(path, f"has {size} bytes, its header asks for {wanted}: it is {kind}", "copy it again")
            records = np.empty((-(-header.rows // BLOCK), 4), dtype="<u8")
            view, done = records.reshape(-1).view(np.uint8).data, 0
            while done < len(view):
                if not (count := file.readinto(view[done:])):
                    raise refused(path, "became shorter while it was read", "copy it again")
                done += count
            crc = file.read(4)
    except OSError as wrong:
        raise refused(path, f"cannot be read: {wrong.strerror}", "") from None
    if zlib.crc32(view, zlib.crc32(header.bytes)).to_bytes(4, "little") != crc:
        raise refused(path, "does not match its checksum", "it was altered: copy it again")
    class_map = ClassMap(header.rows, records)
    class_map.check(path)
    found = [c.rows for c in header.classes] + [0] * (CLASSES - len(header.classes))
    if found != class_map.counts:
        raise refused(path, f"has classes of {class_map.counts} rows, its header says {found}", "it was altered")
    return header, class_map


def _header(text: bytes, path: Path) -> MapHeader:
    try:
        fields = dict(json.loads(text)["__metadata__"])
        known = fields["format"], fields["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        hint = "it is another kind of file, or it was altered"
        raise refused(path, "has no header of a class map", hint) from None
    if known != (FORMAT, str(VERSION)):
        raise refused(path, f"has format and version {known}, this release reads {(FORMAT, str(VERSION))}", "")
    try:
        header = MapHeader(
            int(fields["width"]), int(fields["rows"]), int(fields["layer"]),
            [ClassFile(*line) for line in json.loads(fields["classes"])],
        )  # fmt: skip
        if any(type(value) not in kinds for c in header.classes for value, kinds in zip(c, _KINDS, strict=True)):
            raise TypeError(fields["classes"])
        header.check()
    except RowStoreError as wrong:
        raise refused(path, f"cannot be read: {wrong}", wrong.hint) from None
    except (ValueError, KeyError, TypeError, RecursionError) as wrong:
        raise refused(path, f"has a field that is missing or of the wrong type: {wrong!r}", "it was altered") from None
    return header
