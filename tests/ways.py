"""Table files for tests, and the ways to read them that this machine can go."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from engram.kernels.codecs import CODECS, Bytes
from engram.quantize.mapped import MappedTable
from engram.quantize.row_store import RowStoreError, write_table

BUILT = importlib.util.find_spec("engram.kernels._C") is not None
WAYS = ("mmap", "uring", "pread", "numpy") if BUILT else ("numpy",)
ROWS, WIDTH = 5000, 72
EVERY_ROW = np.arange(ROWS)


def table_file(folder: Path, codec: str = "int8-row", rows: int = ROWS, width: int = WIDTH) -> tuple[Path, Bytes]:
    """A table file, and its rows as the codec encodes them."""
    values = np.random.default_rng(5).standard_normal((rows, width)).astype(np.float32)
    path = folder / "layer-03.safetensors"
    write_table(path, [values], rows=rows, width=width, codec=CODECS[codec], layer=3)
    return path, CODECS[codec].encode(values)


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def open_or_skip(path: Path, io: str, verify: str = "first-touch") -> MappedTable:
    """Open a table; skip where the file system refuses io_uring or O_DIRECT."""
    try:
        return MappedTable.open(path, io=io, verify=verify)
    except RowStoreError as error:
        if io == "uring" and "cannot be used here" in str(error):
            pytest.skip(str(error))
        raise
