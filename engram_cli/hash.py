"""`engram hash`: the row ids of a token sequence, the window through which anyone can check the hashing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from engram.cli import options, ui
from engram.cli.sizes import parse_ints


def hash_rows(
    layout: Annotated[Path, typer.Argument(metavar="LAYOUT|PACKAGE", help="A layout, checkpoint or package folder.")],
    ids: Annotated[Optional[str], typer.Option("--ids", help="Raw token ids.", metavar="I,I")] = None,
    text: Annotated[
        Optional[str], typer.Option("--text", metavar="TEXT", help="Text for the folder's own tokenizer.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Rows within each head instead of within the table.")] = False,
    json: options.Json = False,
) -> None:
    """Print the rows that each token of a sequence looks up."""
    if (ids is None) == (text is None):
        raise typer.BadParameter("give either --ids or --text")
    from engram.builders.build_vocab import hash_report

    result = hash_report(layout, ids=None if ids is None else list(parse_ints(ids)), text=text, local=local)
    ui.emit(result) if json else _tables(result)


def _tables(result: dict[str, Any]) -> None:
    for layer, rows_TC in result["rows"].items():
        columns = [
            "position",
            "id",
            "compressed",
            *(f"c{column}" for column in range(len(rows_TC[0]) if rows_TC else 0)),
        ]
        lines = zip(result["ids"], result["compressed"], rows_TC, strict=True)
        ui.table(
            f"Layer {layer}", columns, [[str(at), *map(str, (i, c, *row))] for at, (i, c, row) in enumerate(lines)]
        )
