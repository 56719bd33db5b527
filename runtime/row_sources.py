"""Where compared rows come from: the float table, a written one, or what a plan would make of the float rows. No torch.

Shape letters: B windows, T positions, C columns, N = B * T * C rows, U distinct rows, D width.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from engram.builders.checkpoint import Checkpoint, CheckpointError, table_file
from engram.builders.layout import Layout
from engram.kernels import dispatch
from engram.kernels.codecs import find_codec
from engram.quantize.plan import TablePlan
from engram.quantize.row_report import naming
from engram.quantize.row_table import RowTable

Ints = NDArray[np.int64]
Singles = NDArray[np.float32]


class FloatTables:
    """Rows of a float checkpoint's tables, read by their offsets: what was read does not stay in this process.

    Through a mapping it would: every row read keeps a page or more resident, until a table fills the memory.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files: dict[int, int] = {}
        self._begin: dict[int, int] = {}
        self._paths = {layer: checkpoint.folder / table_file(layer) for layer in checkpoint.layout.layers}
        self._width = checkpoint.layout.head_dim
        for layer, path in self._paths.items():
            mapped = checkpoint.table(layer)
            assert isinstance(mapped, np.memmap)
            self._begin[layer] = int(mapped.offset)
            self._files[layer] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._files[layer])

    def rows(self, layer: int, rows_N: Ints) -> Singles:
        """float32 [N, D]; every different row is read once, neighbours together."""
        rows_U, place_N = np.unique(rows_N, return_inverse=True)
        out_UD = np.empty((len(rows_U), self._width), dtype="<f4")
        if len(rows_U):
            flat, size = out_UD.data.cast("B"), 4 * self._width
            first = np.flatnonzero(np.diff(rows_U, prepend=rows_U[0] - 2) != 1)  # of each run of neighbours
            ends = np.append(first[1:], len(rows_U)) * size
            offsets = self._begin[layer] + rows_U[first] * size
            for begin, end, offset in zip((first * size).tolist(), ends.tolist(), offsets.tolist(), strict=True):
                self._read(layer, flat[begin:end], offset)
        return out_UD[place_N]

    def _read(self, layer: int, out: memoryview, offset: int) -> None:
        """Fill `out` from the file; one read unless it is larger than the system reads at once."""
        while len(out):
            got = os.preadv(self._files[layer], [out], offset)
            if not got:
                raise CheckpointError(
                    f"table {self._paths[layer]} ends at byte {offset}, rows behind it are asked for: truncated?",
                    hint="it was altered after it was opened",
                )
            out, offset = out[got:], offset + got

    def __call__(self, layer: int, rows_BTC: Ints) -> Singles:
        """Memory [B, T, C * D]."""
        return self.rows(layer, rows_BTC.reshape(-1)).reshape(*rows_BTC.shape[:2], -1)


class StoredRows:
    """Rows of written tables, as a reader of the artifact would decode them."""

    def __init__(self, tables: Mapping[int, RowTable]) -> None:
        self._tables = tables

    def __call__(self, layer: int, rows_BTC: Ints) -> Singles:
        """Memory [B, T, C * D]."""
        table = self._tables[layer]
        out = np.empty((*rows_BTC.shape[:2], rows_BTC.shape[2] * table.width), dtype=np.float32)
        table.decode(np.ascontiguousarray(rows_BTC), out, threads=0)
        return out


class PlannedRows:
    """What tables written by a plan would hold, bit for bit: the float rows that are read, encoded and decoded."""

    def __init__(self, source: FloatTables, layout: Layout, plans: Mapping[int, TablePlan]) -> None:
        self._source, self._layout, self._plans = source, layout, plans

    def __call__(self, layer: int, rows_BTC: Ints) -> Singles:
        """Memory [B, T, C * D]."""
        plan = self._plans[layer]
        rows_U, place_N = np.unique(rows_BTC, return_inverse=True)
        values_UD = self._source.rows(layer, rows_U)
        class_U = plan.classes(rows_U, self._layout, layer)
        made_UD = np.zeros_like(values_UD)
        for number, name in enumerate(plan.codecs):
            picked = class_U == number
            if name is not None and picked.any():
                made_UD[picked] = through_codec(name, rows_U[picked], values_UD[picked], layer)
        return made_UD[place_N.reshape(-1)].reshape(*rows_BTC.shape[:2], -1)


def through_codec(name: str, rows_U: Ints, values_UD: Singles, layer: int) -> Singles:
    """Values of these rows of a table, encoded and decoded again; CodecError names the row that cannot be encoded."""
    codec, operations = find_codec(name), dispatch.ops()
    with naming(codec, rows_U, values_UD, layer):
        encoded = operations.encode(codec, values_UD, threads=0)
    every_U = np.arange(len(values_UD), dtype=np.int64)
    made: Singles = operations.gather(codec, encoded, every_U[:, None], width=values_UD.shape[1], threads=0)
    return made
