"""`engram quantize`: a float checkpoint's tables into small ones."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from engram.cli import options, progress, ui
from engram.cli.sizes import show_bytes


class RowCodec(StrEnum):
    """How a row is stored."""

    int8 = "int8"
    int8_row = "int8-row"
    nf4 = "nf4"
    fp8_e8m0 = "fp8-e8m0"
    q8_0 = "q8_0"
    q4_0 = "q4_0"
    iq4_nl = "iq4_nl"
    h4 = "h4"
    h3 = "h3"
    h2 = "h2"
    fp8_row = "fp8-row"
    bf16 = "bf16"
    f32 = "f32"


def quantize(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A float checkpoint (train, fill).")],
    out: options.Out,
    tables: Annotated[RowCodec, typer.Option("--tables", help="How to store the rows.")] = RowCodec.int8,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Store tables in fewer bits and report the error of each."""
    from engram.quantize.tables import QuantizeConfig
    from engram.quantize.tables import quantize as work

    config = QuantizeConfig(checkpoint, out, tables=tables.value, force=force)
    result = work(config, progress.on_screen())
    if not json:
        _table(result["tables"])
    ui.report(result, json, title=f"Quantized into {out}")


def _table(tables: dict[str, Any]) -> None:
    rows = [
        [layer, row["codec"], show_bytes(row["bytes_before"]), show_bytes(row["bytes"]), f"{row['rel_error']:.3%}"]
        for layer, row in tables.items()
    ]
    ui.table("", ["layer", "codec", "before", "after", "relative error"], rows)
