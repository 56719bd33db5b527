"""Mixed tables for tests, and a model of them that is a plain dict: row id to values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engram.kernels.codecs import CODECS, Bytes, Floats
from engram.quantize.class_map import ClassMap
from engram.quantize.mixed_file import map_name
from engram.quantize.mixed_writer import MixedWriter
from engram.quantize.plan import TablePlan

NAMES = ("f32", "int8", None, "nf4")  # of classes 0 to 3; class 2 is dropped
WIDTH = 40
PLAN = TablePlan(("nf4", "int8", None), (0, 1, 0, 1), {2: np.arange(5, 8000, 7)})  # for four heads and some 8000 rows


def pieces(array: Any, seed: int = 0) -> list[Any]:
    """An array cut anywhere."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(array) + 1, 5))
    return np.split(array, cuts)


def write(
    folder: Path, class_N: Bytes, names: tuple[str | None, ...] = NAMES, *, width: int = WIDTH, layer: int = 3,
    seed: int = 1,
) -> tuple[Path, Floats, dict[str, Any]]:  # fmt: skip
    """A mixed table in folder/tables: the path of its map, its float rows, its manifest entry."""
    values = np.random.default_rng(seed).standard_normal((len(class_N), width)).astype(np.float32)
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    class_map = ClassMap.build(len(class_N), pieces(class_N))
    codecs = [None if name is None else CODECS[name] for name in names]
    with MixedWriter(folder, layer, class_map, codecs, width=width) as writer:
        for part in pieces(values, 1):
            writer.append(part)
    assert writer.entry is not None
    return folder / map_name(layer), values, writer.entry


def model(values: Floats, class_N: Bytes, names: tuple[str | None, ...] = NAMES) -> dict[int, Floats]:
    """Every row by itself through its own codec."""
    rows = {}
    for r, c in enumerate(class_N.tolist()):
        codec = None if names[c] is None else CODECS[str(names[c])]
        row = values[r : r + 1]
        rows[r] = (np.zeros_like(row) if codec is None else codec.decode(codec.encode(row), row.shape[1]))[0]
    return rows


def random_classes(rows: int, seed: int = 0) -> Bytes:
    """Classes in stretches and scattered."""
    rng = np.random.default_rng(seed)
    class_N = np.repeat(rng.integers(0, 4, rows // 50 + 1), 50)[:rows].astype(np.uint8)
    anywhere = rng.integers(0, rows, rows // 3 + 1)
    class_N[anywhere] = rng.integers(0, 4, len(anywhere))
    return class_N
