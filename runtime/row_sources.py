"""Where compared rows come from: the float table, a written one, or what a plan would make of the float rows. No torch.

Shape letters: B windows, T positions, C columns, N = B * T * C rows, U distinct rows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from engram.builders.checkpoint import Checkpoint
from engram.builders.layout import Layout
from engram.kernels import dispatch
from engram.kernels.codecs import find_codec
from engram.quantize.mapped import RowTable
from engram.quantize.plan import TablePlan

Ints = NDArray[np.int64]
Singles = NDArray[np.float32]


class FloatTables:
    """Rows of a float checkpoint's mapped tables."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tables = {layer: checkpoint.table(layer) for layer in checkpoint.layout.layers}

    def rows(self, layer: int, rows_N: Ints) -> Singles:
        """float32 [N, D]."""
        return np.asarray(self._tables[layer][rows_N])

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
                made_UD[picked] = through_codec(name, values_UD[picked], layer)
        return made_UD[place_N.reshape(-1)].reshape(*rows_BTC.shape[:2], -1)


def through_codec(name: str, rows_UD: Singles, layer: int) -> Singles:
    """Rows encoded and decoded again."""
    codec, operations = find_codec(name), dispatch.ops()
    encoded = operations.encode(codec, rows_UD, table=f"layer {layer}", threads=0)
    every_U = np.arange(len(rows_UD), dtype=np.int64)
    made: Singles = operations.gather(codec, encoded, every_U[:, None], width=rows_UD.shape[1], threads=0)
    return made
