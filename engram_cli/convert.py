"""`engram convert`: the tables of a published checkpoint into our package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from engram.cli import options, progress, ui


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A published checkpoint: a folder, or a GGUF.")
    ],
    out: options.Out,
    in_place: Annotated[
        bool,
        typer.Option("--in-place", help="Leave the rows where they are: the package holds a checksummed map of them."),
    ] = False,
    tables: Annotated[
        Optional[str],
        typer.Option(metavar="CODEC", help="Store rows in this codec, such as nf4, not the source's."),
    ] = None,
    tokenizer: Annotated[
        Optional[str],
        typer.Option(metavar="PATH|NAME", help="The model's tokenizer, where SOURCE has none (DeepSeek needs it)."),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Turn published tables into a package, byte for byte unless --tables; only their shards are read."""
    from engram.quantize.convert import ConvertConfig
    from engram.quantize.convert import convert as run

    config = ConvertConfig(source, out, in_place=in_place, tables=tables, tokenizer=tokenizer, force=force)
    result = run(config, progress.on_screen())
    if result["missing"] and not json:
        typer.echo(f"not here, so not kept: {', '.join(result['missing'])}", err=True)
    ui.report(result, json, title=f"Package in {out}")
