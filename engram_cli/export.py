"""`engram export`: a checkpoint into the package that a laptop maps."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from engram.cli import options, progress, ui


class Format(StrEnum):
    """What to write."""

    package = "package"


def export(
    source: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A float or quantized checkpoint, or a package.")
    ],
    out: options.Out,
    format: Annotated[Format, typer.Option("--format", help="The layout of the files.")] = Format.package,
    embed_backbone: Annotated[
        bool,
        typer.Option("--embed-backbone/--reference-backbone", help="Copy the backbone in, or name it with its hash."),
    ] = True,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Write the package that a laptop maps, checksummed."""
    from engram.quantize.package import ExportConfig, export_package

    config = ExportConfig(source, out, embed_backbone=embed_backbone, force=force)
    ui.report(export_package(config, progress.on_screen()), json, title=f"Package in {out}")
