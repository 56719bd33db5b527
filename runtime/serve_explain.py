"""What lies behind a token: its n-grams, the rows they hash to, and the codec that each row is stored in."""

from __future__ import annotations

from typing import Any

import numpy as np

from engram.quantize.mixed_table import MixedTable
from engram.quantize.package import Package
from engram.quantize.row_table import RowTable

DROPPED = "dropped"


class Explainer:
    """Reads nothing but ids: the layout hashes, the tables' headers say the codec."""

    def __init__(self, package: Package, tokenizer: Any) -> None:
        self._layout, self._tables, self._tokenizer = package.layout, package.layers, tokenizer
        self.context = max(2, package.layout.orders[-1] + 1)  # tokens that the rows of the last one depend on, and one

    def text(self, token: int) -> str:
        """A token as text; a part of a character is shown as the replacement character."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def token(self, recent: list[int], gates: dict[int, float] | None) -> dict[str, Any]:
        """The object beside a piece of text: `recent` ends with the token; `gates` are 0 … 1, by layer."""
        layout = self._layout
        found = layout.rows(np.array([recent[-self.context :]], dtype=np.int64))
        rows = {layer: rows_BTC[0, -1].tolist() for layer, rows_BTC in found.items()}
        names = dict.fromkeys(_codec(self._tables[layer], row) for layer, ids in rows.items() for row in ids)
        grams = [recent[-order:] for order in layout.orders if len(recent) >= order]
        return {
            "token": self.text(recent[-1]), "id": recent[-1],
            "gates": None if gates is None else {str(layer): round(value, 4) for layer, value in gates.items()},
            "ngrams": [str(self._tokenizer.decode(gram, skip_special_tokens=False)) for gram in grams],
            "rows": {str(layer): ids for layer, ids in rows.items()}, "codec": ", ".join(names),
        }  # fmt: skip


def _codec(table: RowTable, row: int) -> str:
    if isinstance(table, MixedTable):
        number = int(table.class_map.classes(row, row + 1)[0])
        return table.header.classes[number].codec or DROPPED
    return table.codec_name
