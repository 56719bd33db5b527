"""`engram export`: a checkpoint into the package that a laptop maps; a converted one into what other engines read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from engram import EngramError
from engram.cli import options, progress, ui


class Format(StrEnum):
    """What to write."""

    package = "package"
    safetensors = "safetensors"
    gguf = "gguf"
    vllm = "vllm"
    ds4 = "ds4"


class ExportUsageError(EngramError):
    """Options that contradict each other."""


def export(
    source: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A checkpoint or a package; for other engines one of convert."),
    ],
    out: options.Out,
    format: Annotated[
        Format, typer.Option("--format", help="The layout: ours, the published one, or another engine's.")
    ] = Format.package,
    embed_backbone: Annotated[
        bool,
        typer.Option("--embed-backbone/--reference-backbone", help="Copy the backbone in, or name it with its hash."),
    ] = True,
    backbone: Annotated[
        Optional[Path],
        typer.Option(
            "--backbone", metavar="FILE.gguf",
            help="package: takes the place of the checkpoint's backbone; gguf, ds4: copied with our table in it.",
        ),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Write the package that a laptop maps, or converted tables as other engines read them."""
    if backbone is not None and format not in (Format.package, Format.gguf, Format.ds4):
        raise ExportUsageError(f"--backbone {backbone} is of no use to --format {format}", hint="leave it out")
    if not embed_backbone and format != Format.package:
        raise ExportUsageError(f"--reference-backbone is of no use to --format {format}", hint="leave it out")
    if format == Format.package:
        from engram.quantize.package import ExportConfig, export_package

        config = ExportConfig(source, out, embed_backbone=embed_backbone, force=force, backbone=backbone)
        ui.report(export_package(config, progress.on_screen()), json, title=f"Package in {out}")
        return
    ui.report(_target(format, source, out, backbone, force), json, title=f"{format} in {out}")


def _target(format: Format, source: Path, out: Path, backbone: Path | None, force: bool) -> dict[str, Any]:
    from engram.quantize.export import ds4, gguf, safetensors, vllm
    from engram.quantize.export.target import TargetConfig

    run = {
        Format.safetensors: safetensors.export, Format.gguf: gguf.export, Format.vllm: vllm.export,
        Format.ds4: ds4.export,
    }[format]  # fmt: skip
    return run(TargetConfig(source, out, backbone, force), progress.on_screen())
