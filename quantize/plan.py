"""Which codec every row of a table gets: by head, and row by row where a text showed how often rows are read. No torch.

Shape letters: N rows, C columns (heads of all orders), U listed rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import EngramError
from engram.builders.layout import Layout
from engram.kernels.codecs import Codec, find_codec
from engram.quantize.mixed_file import ClassFile, MapHeader
from engram.quantize.row_store import Geometry

MOST_CLASSES = 4
_SEAL = 64 * "0"  # stands in for a seal, whose length is always this
_BLOCK = 1 << 20

Ints = NDArray[np.int64]


class PlanError(EngramError):
    """A plan that no table can follow."""


@dataclass(frozen=True)
class TablePlan:
    """Codecs by class (None: rows are not stored and read as zeros), the class of each head's rows, and exceptions.

    `listed` has ascending row ids by class; a row that no list names is of its head's class.
    """

    codecs: tuple[str | None, ...]
    heads: tuple[int, ...]
    listed: Mapping[int, Ints] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse classes that do not exist, and more of them than a table can have."""
        if not 1 <= len(self.codecs) <= MOST_CLASSES:
            raise PlanError(f"a table has 1 to {MOST_CLASSES} classes of rows, not {len(self.codecs)}")
        for codec in self.codecs:
            if codec is not None:
                find_codec(codec)
        for number in {*self.heads, *self.listed}:
            if not 0 <= number < len(self.codecs):
                raise PlanError(f"class {number} has no codec; there are {len(self.codecs)}")

    @classmethod
    def uniform(cls, codec: str, layout: Layout) -> TablePlan:
        """All rows in one codec."""
        return cls((codec,), (0,) * layout.columns)

    @property
    def mixed(self) -> bool:
        """Whether the table needs a map of classes."""
        return len(self.codecs) > 1 or self.codecs[0] is None

    def stored(self) -> list[Codec]:
        """The codecs of classes that are stored."""
        return [find_codec(name) for name in self.codecs if name is not None]

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the bytes of a table."""
        digest = hashlib.sha256(json.dumps([self.codecs, [c.version for c in self.stored()], self.heads]).encode())
        for number in sorted(self.listed):
            digest.update(f"{number}:{len(self.listed[number])}".encode() + self.listed[number].astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def name(self) -> str:
        """For people: the codecs, the first class first."""
        return "+".join(codec or "dropped" for codec in self.codecs)

    def classes(self, rows_N: Ints, layout: Layout, layer: int) -> NDArray[np.uint8]:
        """The class of each of these rows."""
        offsets_C = layout.offsets(layer)
        found = np.array(self.heads, dtype=np.uint8)[np.searchsorted(offsets_C, rows_N, side="right") - 1]
        for number, listed_U in self.listed.items():
            if len(listed_U):
                place = np.minimum(np.searchsorted(listed_U, rows_N), len(listed_U) - 1)
                found[listed_U[place] == rows_N] = number
        return found

    def blocks(self, layout: Layout, layer: int) -> Iterator[NDArray[np.uint8]]:
        """The classes of all rows of a table in order, in bounded memory."""
        rows = layout.table_rows[layer]
        for first in range(0, rows, _BLOCK):
            yield self.classes(np.arange(first, min(first + _BLOCK, rows), dtype=np.int64), layout, layer)

    def counts(self, layout: Layout, layer: int) -> list[int]:
        """Rows of each class."""
        total = np.zeros(len(self.codecs), dtype=np.int64)
        ends = np.append(layout.offsets(layer)[1:], layout.table_rows[layer])
        for number, begin, end in zip(self.heads, layout.offsets(layer), ends, strict=True):
            total[number] += end - begin
        for number, listed_U in self.listed.items():
            total[number] += len(listed_U)
            heads = np.array(self.heads)[np.searchsorted(layout.offsets(layer), listed_U, side="right") - 1]
            total -= np.bincount(heads, minlength=len(total))
        return [int(n) for n in total]

    def bytes(self, layout: Layout, layer: int) -> int:
        """Bytes of the table's files: those of the classes, and the map where there is one."""
        return sum(self._sizes(self.counts(layout, layer), layout, layer))

    def _sizes(self, counts: list[int], layout: Layout, layer: int) -> list[int]:
        """Bytes of each class's file (pages and checksums; 0 where nothing is stored), then of the map (0 for none)."""
        sizes, classes = [], []
        for codec, rows in zip(self.codecs, counts, strict=True):
            stored = bool(codec is not None and rows)
            version = None if codec is None else find_codec(codec).version
            classes.append(ClassFile(codec, version, rows, _SEAL if stored else None))
            sizes.append(Geometry(find_codec(str(codec)), rows, layout.head_dim, layer).file_bytes if stored else 0)
        rows = layout.table_rows[layer]
        return [*sizes, MapHeader(layout.head_dim, rows, layer, classes).file_bytes if self.mixed else 0]

    def to_json(self, layout: Layout, layer: int) -> dict[str, Any]:
        """What a report says of the plan; `bytes` of the whole are those of the classes and of the map of rows."""
        counts = self.counts(layout, layer)
        sizes = self._sizes(counts, layout, layer)
        values = layout.table_rows[layer] * layout.head_dim
        return {
            "classes": [
                {"codec": codec, "rows": rows, "bytes": size}
                for codec, rows, size in zip(self.codecs, counts, sizes[:-1], strict=True)
            ],
            "heads": [self.codecs[number] for number in self.heads],
            "bytes": sum(sizes), "bits_per_value": 8 * sum(sizes) / values,
        }  # fmt: skip


def frequent_plan(
    codec: str, layout: Layout, weights: tuple[Ints, NDArray[np.float64]], *, frequent: tuple[str, float] | None = None,
    unseen: str | None = None, drop_unseen: bool = False,
) -> TablePlan:  # fmt: skip
    """Seen rows in `codec`, those of greatest weight in a finer one, rows that no text read in a coarser one or none.

    `weights`: ascending rows that a text read, and what each weighs. `frequent`: a codec, and the share of the seen
    rows that get it.
    """
    rows_U, weight_U = weights
    codecs: list[str | None] = [codec]
    listed: dict[int, Ints] = {}
    if frequent is not None:
        finer, share = frequent
        if not 0 < share < 1:
            raise PlanError(f"the share {share:g} of frequent rows must lie between 0 and 1")
        count = max(1, round(share * len(rows_U))) if len(rows_U) else 0
        listed[len(codecs)] = np.sort(rows_U[np.argsort(-weight_U, kind="stable")[:count]])
        codecs.append(finer)
    rest = 0
    if unseen is not None or drop_unseen:
        rest = len(codecs)
        codecs.append(None if drop_unseen else unseen)
        taken = listed[1] if 1 in listed else np.empty(0, dtype=np.int64)
        listed[0] = np.setdiff1d(rows_U, taken, assume_unique=True)
    return TablePlan(tuple(codecs), (rest,) * layout.columns, listed)
