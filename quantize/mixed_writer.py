"""Writes a mixed table: float rows in table order, each encoded as its class says, into the class's file.

Shape letters: N rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engram.kernels import dispatch
from engram.kernels.codec_base import finite_rows
from engram.kernels.codecs import Codec, Floats
from engram.quantize.class_map import CLASSES, ClassMap
from engram.quantize.mixed_file import map_name, part_name, write_map
from engram.quantize.row_store import RowStoreError, RowWriter, TableFile


class MixedWriter:
    """Writes `folder`/tables/layer-NN.mixed.safetensors and a table file for each class with rows, in bounded memory.

    Use as a context manager; `append` float rows until there are as many as the class map has. `codecs` has the codec
    of each class, None for one that is dropped. When the block ends `entry` holds the table's entry of a manifest
    (FORMAT.md 3.1); when it fails, nothing stays. To go on after a kill: `sync`, `resume` and `keep` as RowWriter has
    them, over all classes; `count` says where it begins. Raises RowStoreError for a class with rows but no entry in
    `codecs`, and for more or fewer rows than the map has.
    """

    def __init__(
        self, folder: Path, layer: int, class_map: ClassMap, codecs: Sequence[Codec | None], *, width: int,
        resume: int = 0, keep: bool = False,
    ) -> None:  # fmt: skip
        if not 1 <= len(codecs) <= CLASSES:
            raise RowStoreError(f"{len(codecs)} codecs; a mixed table has 1 to {CLASSES} classes")
        for number, rows in enumerate(class_map.counts):
            if rows and number >= len(codecs):
                raise RowStoreError(f"class {number} of layer {layer} has {rows} rows and no codec",
                                    hint="give one codec for each class, None for one that is dropped")  # fmt: skip
        self.folder, self.layer, self.width = folder, layer, width
        self.class_map, self.codecs = class_map, list(codecs)
        self.entry: dict[str, Any] | None = None
        self.count = 0
        self._resume, self._keep = min(resume, class_map.rows), keep
        self._written: list[int] = []  # of each class
        self._writers: dict[int, RowWriter] = {}

    def __enter__(self) -> Self:
        if not self._open(self._resume):
            self._opened.__exit__(RowStoreError, RowStoreError("not all classes are there up to this row"), None)
            self._open(0)
        return self

    def _open(self, rows: int) -> bool:
        """Open every class behind the first `rows` rows of the table; False where a class does not hold them."""
        self.count, self._written = rows, self.class_map.before(rows)
        self._writers.clear()
        name = map_name(self.layer)
        with ExitStack() as opened:
            for number, codec in enumerate(self.codecs):
                if codec is not None and self.class_map.counts[number]:
                    writer = RowWriter(
                        self.folder / part_name(name, number), self.class_map.counts[number], self.width, codec,
                        self.layer, resume=self._written[number], keep=self._keep,
                    )  # fmt: skip
                    self._writers[number] = opened.enter_context(writer)
            self._opened = opened.pop_all()
        return all(writer.count == self._written[number] for number, writer in self._writers.items())

    def sync(self) -> None:
        """Have all rows that were appended on the disk."""
        for writer in self._writers.values():
            writer.sync()

    def append(self, rows_ND: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Encode and store the next rows; |x - x'|^2 and |x|^2 of each, as `row_errors` gives them.

        Raises CodecError for values that a codec cannot hold, named by class and place in it.
        """
        begin, end = self.count, self.count + len(rows_ND)
        if end > self.class_map.rows:
            raise RowStoreError(
                f"layer {self.layer}: more rows arrive than the {self.class_map.rows} that the class map has"
            )
        class_N = self.class_map.classes(begin, end)
        lost_N, whole_N = np.empty(len(rows_ND)), np.empty(len(rows_ND))
        operations = dispatch.ops()
        for number in np.flatnonzero(np.bincount(class_N)).tolist():
            here = np.flatnonzero(class_N == number)
            codec, first = self.codecs[number], self._written[number]
            name = f"layer {self.layer}, rows of class {number}"
            part_nD = np.ascontiguousarray(rows_ND[here])
            if codec is None:
                lost_N[here] = whole_N[here] = np.square(finite_rows(part_nD, name, first), dtype=np.float64).sum(1)
            else:
                encoded = operations.encode(codec, part_nD, table=name, first_row=first, threads=0)
                self._writers[number].append(encoded)
                lost_N[here], whole_N[here] = operations.row_errors(codec, encoded, part_nD, threads=0)
            self._written[number] += len(here)
        self.count = end
        return lost_N, whole_N

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self.count != self.class_map.rows:
            error = RowStoreError(
                f"layer {self.layer}: {self.count} rows arrived of the {self.class_map.rows} that the class map has"
            )
        try:
            self._opened.__exit__(None if error is None else type(error), error, trace)
            if kind is None and error is not None:
                raise error
            if error is None:
                self.entry = write_map(
                    self.folder, self.width, self.layer, self.class_map,
                    [None if codec is None else (codec.name, codec.version) for codec in self.codecs], self._made(),
                )  # fmt: skip
        finally:
            if self.entry is None:
                for writer in self._writers.values():
                    if writer.table_file is not None:
                        writer.path.unlink(missing_ok=True)

    def _made(self) -> dict[int, TableFile]:
        made = {}
        for number, writer in self._writers.items():
            assert writer.table_file is not None
            made[number] = writer.table_file
        return made
