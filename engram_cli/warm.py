"""`engram warm`: keep the rows that the user's own text reads most, if that is shown to help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from engram.cli import options, progress, ui
from engram.cli.sizes import parse_count, parse_size, show_bytes


def warm(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help="A package folder.")],
    text: Annotated[
        Optional[list[str]],
        typer.Option("--from", metavar="CORPUS", help="Text like yours: files, folders or globs; repeatable."),
    ] = None,
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="Keep at most this much.")] = "64MB",
    max_tokens: Annotated[Optional[str], typer.Option(help="Read no more tokens than this.", metavar="N")] = None,
    drop: Annotated[bool, typer.Option("--drop", help="Remove what was kept.")] = False,
    field: options.Field = "text",
    column: options.Column = "text",
    suffix: options.Suffixes = [],
    strict: options.Strict = False,
    json: options.Json = False,
) -> None:
    """Keep the rows that your text reads most, if it helps."""
    if bool(text) == drop:
        raise typer.BadParameter("give either --from or --drop")
    from engram.builders.corpus import CorpusConfig
    from engram.runtime import warm as work

    if drop:
        return ui.report(work.drop(package), json, title=f"Hot rows of {package}")
    config = work.WarmConfig(
        package=package,
        text=CorpusConfig(tuple(text or ()), field=field, column=column, strict=strict, suffixes=tuple(suffix)),
        size=parse_size(size),
        max_tokens=None if max_tokens is None else parse_count(max_tokens),
    )
    result = work.warm(config, progress.on_screen())
    ui.emit(result) if json else _words(result)


def _words(result: dict[str, Any]) -> None:
    cold = result["cold_seconds"]
    rows = sum(result["rows"].values())
    print(
        f"{rows:,} rows ({show_bytes(result['bytes'])}) of {result['tokens']:,} tokens serve"
        f" {result['lookups_served']:.0%} of the lookups of {result['held_out_tokens']:,} others;"
        f" from a cold disk these take {cold['with']:.3f} s instead of {cold['without']:.3f} s:"
        f" {'kept' if result['kept'] else 'not worth keeping, removed'}"
    )
