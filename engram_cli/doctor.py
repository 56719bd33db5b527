"""`engram doctor`: what this machine and this disk are good for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engram.cli import options, progress, ui
from engram.cli.sizes import parse_seconds


def doctor(
    place: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where tables lie or shall lie; or a package.")
    ] = Path(),
    seconds: Annotated[
        str, typer.Option(metavar="TIME", help="How long to probe the disk at each queue depth; 0s: not at all.")
    ] = "1s",
    json: options.Json = False,
) -> None:
    """Look at machine, disk and caches, and say what each finding means; exit 1 where something is a problem."""
    from engram.runtime.doctor import PROBLEM, examine

    result = examine(place, parse_seconds(seconds), progress.on_screen())
    if json:
        ui.emit(result)
    else:
        rows = [[one["verdict"], one["what"], one["found"], one["means"]] for one in result["findings"]]
        ui.table(f"Looked at {result['place']}", ["", "what", "found", "which means"], rows)
    if any(one["verdict"] == PROBLEM for one in result["findings"]):
        raise typer.Exit(1)
