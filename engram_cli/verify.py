"""`engram verify`: is a package whole and what it says it is?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from engram.cli import options, progress, ui


def verify(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help="A package folder.")],
    against: Annotated[
        Optional[Path],
        typer.Option(metavar="SOURCE", help="The published checkpoint that it was converted from: compare with that."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Check a package; exit 1 when something is wrong."""
    from engram.quantize.verify import verify_package

    result = verify_package(package, progress.on_screen(), against=against)
    if json:
        ui.emit(result)
    else:
        ui.report({"ok": result["ok"], "checked": result["checked"]}, False, title=str(package))
        for problem in result["problems"]:
            print(ui.printable(f"  - {problem}"))
    if not result["ok"]:
        raise typer.Exit(1)
