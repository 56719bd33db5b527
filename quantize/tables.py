"""`engram quantize`: a float checkpoint's tables through a row codec, row block by row block, with the error of each.

Shape letters: n rows of a block, D width.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engram import EngramError, Progress
from engram.builders.atomic import atomic_folder
from engram.builders.checkpoint import MANIFEST, Checkpoint, open_checkpoint, table_file
from engram.kernels.codecs import Codec, Floats, find_codec
from engram.quantize.folder import check_target
from engram.quantize.plan import TablePlan
from engram.quantize.row_store import Geometry, RowWriter, TableFile

FORMAT = "engram-quantized"
VERSION = 1
_LEFT_BEHIND = ("tables", "state", MANIFEST)  # state resumes the training of float tables
_BLOCK_BYTES = 4 << 20


class QuantizeError(EngramError):
    """A checkpoint whose tables cannot be quantized."""


@dataclass(frozen=True)
class QuantizeConfig:
    """What to quantize, how, and where the result goes."""

    checkpoint: Path
    out: Path
    tables: str = "int8"
    plans: Mapping[int, TablePlan] | None = None  # by layer; all rows in `tables` where there is none
    force: bool = False


@dataclass
class RowErrors:
    """Errors of a table, gathered block by block; relative errors are ||x - x'|| / ||x||."""

    worst_row: int = -1
    worst_row_error: float = 0.0
    _rows: int = field(default=0, repr=False)
    _lost: float = field(default=0.0, repr=False)
    _whole: float = field(default=0.0, repr=False)

    def add(self, rows_nD: Floats, back_nD: Floats) -> None:
        """Count the next rows and what they became. A row of zeros has no relative error and counts as 0."""
        difference = back_nD - rows_nD
        lost = np.einsum("nd,nd->n", difference, difference, dtype=np.float64)
        whole = np.einsum("nd,nd->n", rows_nD, rows_nD, dtype=np.float64)
        share = np.sqrt(np.divide(lost, whole, out=np.zeros_like(lost), where=whole > 0))
        if len(share) and (self.worst_row < 0 or float(share.max()) > self.worst_row_error):
            self.worst_row, self.worst_row_error = self._rows + int(share.argmax()), float(share.max())
        self._rows += len(rows_nD)
        self._lost += float(lost.sum())
        self._whole += float(whole.sum())

    @property
    def rel_error(self) -> float:
        """Of the table as a whole."""
        return math.sqrt(self._lost / self._whole) if self._whole else 0.0


def quantize(config: QuantizeConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Write a quantized checkpoint: tables through the codec, everything else unchanged but for `state/`.

    Returns the fields of `engram quantize --json`. Memory does not grow with the tables. Raises CheckpointError for a
    source that is no sound float checkpoint, CodecError for an unknown codec, an unfit width or a value that is not
    finite, QuantizeError where `out` may not be written.
    """
    begin = time.monotonic()
    progress = progress or Progress()
    codec = find_codec(config.tables)
    check_target(config.checkpoint, config.out, force=config.force, error=QuantizeError)
    checkpoint = open_checkpoint(config.checkpoint)
    layout = checkpoint.layout
    for layer in layout.layers:
        Geometry(codec, layout.table_rows[layer], layout.head_dim, layer)  # refuse before any work
    report: dict[str, dict[str, Any]] = {}
    written: dict[str, dict[str, Any]] = {}
    with atomic_folder(config.out, force=config.force, error=QuantizeError) as folder:
        (folder / "tables").mkdir()
        for layer in layout.layers:
            made, errors = _quantize_table(checkpoint, layer, codec, folder / table_file(layer), progress)
            written[str(layer)] = {"file": table_file(layer), **asdict(made)}
            report[str(layer)] = {
                "codec": codec.name, "rows": made.rows, "width": made.width, "bytes": made.bytes,
                "bytes_before": (config.checkpoint / table_file(layer)).stat().st_size,
                "rel_error": errors.rel_error, "worst_row": errors.worst_row, "worst_row_error": errors.worst_row_error,
            }  # fmt: skip
        for path in sorted(config.checkpoint.iterdir()):
            if path.name not in _LEFT_BEHIND:
                shutil.copytree(path, folder / path.name) if path.is_dir() else shutil.copyfile(
                    path, folder / path.name
                )
        if checkpoint.backbone.kind == "embedded":
            checkpoint.backbone.verify(folder)
        manifest = checkpoint.manifest | {"format": FORMAT, "version": VERSION, "tables": written}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return {"out": str(config.out), "tables": report, "backbone": "unchanged", "seconds": time.monotonic() - begin}


def _quantize_table(
    checkpoint: Checkpoint, layer: int, codec: Codec, target: Path, progress: Progress
) -> tuple[TableFile, RowErrors]:
    """One table through the codec; the encoded rows are decoded again to measure what was lost."""
    rows, width = checkpoint.layout.table_rows[layer], checkpoint.layout.head_dim
    errors, done, begin = RowErrors(), 0, time.monotonic()
    with (
        RowWriter(target, rows, width, codec, layer) as writer,
        progress.task(f"layer {layer} to {codec.name}", rows, "rows") as task,
    ):
        for block in float_blocks(checkpoint, layer):
            encoded = codec.encode(block, table=f"layer {layer}", first_row=done)
            errors.add(block, codec.decode(encoded, width))
            writer.append(encoded)
            done += len(block)
            task.advance(len(block))
            task.note(f"{done / max(time.monotonic() - begin, 1e-9):,.0f} rows/s")
    assert writer.table_file is not None
    return writer.table_file, errors


def float_blocks(checkpoint: Checkpoint, layer: int) -> Iterator[Floats]:
    """The layer's float32 rows in order, [n, D] at a time, read beside the mapping so that memory stays bounded."""
    mapped = checkpoint.table(layer)
    assert isinstance(mapped, np.memmap)
    path, offset, (rows, width) = checkpoint.folder / table_file(layer), mapped.offset, mapped.shape
    count = max(1, _BLOCK_BYTES // (4 * width))
    with path.open("rb", buffering=0) as file:
        for first in range(0, rows, count):
            wanted = 4 * width * min(count, rows - first)
            data = os.pread(file.fileno(), wanted, offset + 4 * width * first)
            if len(data) != wanted:
                raise QuantizeError(f"table {path} ends within row {first + len(data) // (4 * width)} of {rows}")
            yield np.frombuffer(data, "<f4").reshape(-1, width)
