"""What every target of an export shares: the converted package that it is made from, and files written whole.

Shape letters: n rows of a block, K bytes a row: a row's values, then its scales.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from engram import EngramError, Progress
from engram.builders.atomic import sync_path
from engram.builders.checkpoint import MANIFEST
from engram.builders.tensor_files import BITS
from engram.kernels.codecs import Bytes
from engram.quantize.mapped import PagedTable
from engram.quantize.package import Package, open_package
from engram.quantize.write_behind import forget

_BEHIND_BYTES = 64 << 20  # written bytes of this stretch may still be in the page cache


class ExportError(EngramError):
    """A package that a target's layout cannot hold, or a target that may not be written there."""


@dataclass(frozen=True)
class TargetConfig:
    """What is exported, and where to. `backbone`: a GGUF whose other tensors are copied beside the table."""

    source: Path
    out: Path
    backbone: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Place:
    """A tensor of the source that held `rows` rows from `first_row` on, `size` bytes of each from byte `column` on."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    first_row: int
    rows: int
    column: int
    size: int


@dataclass(frozen=True)
class Converted:
    """An opened package of `engram convert`: its tables, and where the source had them (`places`, by layer)."""

    package: Package
    tables: Mapping[int, PagedTable]
    family: str
    form: str
    places: Mapping[int, tuple[Place, ...]]
    dense: Mapping[str, str]  # tensor name → file

    @property
    def folder(self) -> Path:
        """The package."""
        return self.package.folder

    def one_layer(self, what: str) -> int:
        """The only layer; ExportError where there are several and `what` holds one."""
        layers = self.package.layout.layers
        if len(layers) != 1:
            raise ExportError(f"{self.folder} has the tables of layers {list(layers)}, {what} holds one")
        return layers[0]

    def refuse_codec(self, layer: int, fits: str, hint: str) -> ExportError:
        """That the rows of a layer have a codec that does not fit."""
        table = self.tables[layer]
        return ExportError(
            f"layer {layer}: rows of codec {table.codec_name!r}, width {table.width}, do not fit: {fits}", hint=hint
        )


@contextmanager
def open_converted(folder: Path) -> Iterator[Converted]:
    """Open a package of `engram convert`. Raises PackageError, and ExportError for a package of another origin."""
    if not (folder / MANIFEST).is_file():
        raise ExportError(
            f"{folder} is no package: it holds no {MANIFEST}", hint="make one of a published checkpoint: engram convert"
        )
    with open_package(folder) as package:
        if (kind := package.manifest["backbone"]["kind"]) != "none":
            raise ExportError(
                f"{folder} has a backbone of its own ({kind}), and memory of the dialect {package.layout.dialect!r} "
                "with our gate: no other engine reads it",
                hint="export it as a package; the other formats take what engram convert made",
            )
        tables = {layer: table for layer, table in package.layers.items() if isinstance(table, PagedTable)}
        for layer in package.layers.keys() - tables.keys():
            raise ExportError(f"layer {layer} of {folder} has rows of several codecs, which no other engine reads")
        try:
            origin = package.manifest["origin"]
            published = origin["published"]
            places = {n: _places(n, table.rows, published["tables"][str(n)]) for n, table in tables.items()}
            found = Converted(package, tables, origin["family"], published["form"], places, dict(published["dense"]))
        except (KeyError, TypeError, ValueError, AttributeError) as wrong:
            raise ExportError(
                f"{folder / MANIFEST} does not say where the rows were published: {wrong!r}",
                hint="convert the checkpoint again",
            ) from wrong
        yield found


def _places(layer: int, all_rows: int, tensors: list[dict[str, object]]) -> tuple[Place, ...]:
    """What the manifest says of a table's tensors, as places of rows."""
    reached, sizes, out = [0, 0], [0, 0], []
    for said in tensors:
        part, rows, dtype, shape = said["part"], said["rows"], str(said["dtype"]), said["shape"]
        if not isinstance(rows, int) or rows < 1 or not isinstance(shape, list) or part not in (0, 1):
            raise ValueError(f"tensor {said['name']!r} of layer {layer}")
        assert isinstance(part, int)
        size = math.prod(shape) * BITS[dtype] // 8 // rows if dtype in BITS else 0
        sizes[part] = size
        out.append((part, str(said["name"]), str(said["file"]), dtype, tuple(shape), reached[part], rows, size))
        reached[part] += rows
    if reached not in ([all_rows, all_rows], [all_rows, 0]):
        raise ValueError(f"layer {layer} has {all_rows} rows, its tensors {reached}")
    return tuple(
        Place(name, file, dtype, shape, first, count, sizes[0] * part, size)
        for part, name, file, dtype, shape, first, count, size in out
    )


def rows_of(table: PagedTable, progress: Progress) -> Iterator[tuple[int, Bytes]]:
    """A table's rows in order, each compared with its checksum: (first row, uint8 [n, K])."""
    with progress.task(f"layer {table.layer}, {table.codec_name}", table.rows * table.row_bytes, "B") as task:
        for first, rows in table.blocks():
            yield first, rows
            task.advance(rows.nbytes)


def write_behind(file: BinaryIO, data: memoryview | bytes, offset: int) -> None:
    """Write at a place of an unbuffered file, and let go of what was written some time before it."""
    view = memoryview(data).cast("B")
    reached = offset
    while view:
        done = os.pwrite(file.fileno(), view, reached)
        view, reached = view[done:], reached + done
    start = max(0, offset - _BEHIND_BYTES)
    forget(file.fileno(), start, reached - start)


@contextmanager
def atomic_file(out: Path) -> Iterator[BinaryIO]:
    """An unbuffered file that becomes `out` when the block ends, or is removed when the block fails."""
    partial = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(out)
    sync_path(out.parent)
