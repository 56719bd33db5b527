"""`engram fill`: tables from n-gram statistics of a corpus, without gradients."""

from __future__ import annotations

from typing import Annotated

import typer

from engram.cli import options, progress, ui


def fill(
    source: Annotated[str, typer.Argument(metavar="CHECKPOINT|RECIPE", help="A checkpoint folder, or a recipe.")],
    corpus: Annotated[
        list[str], typer.Option("--corpus", help="Files, folders or globs to count; repeatable.", metavar="CORPUS")
    ],
    out: options.Out,
    field: options.Field = "text",
    column: options.Column = "text",
    suffix: options.Suffixes = [],
    strict: options.Strict = False,
    seed: options.Seed = 0,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Fill tables from the counts of a corpus, without gradients."""
    from engram.builders.corpus import CorpusConfig
    from engram.builders.fill import FillConfig
    from engram.builders.fill import fill as work

    config = FillConfig(
        source,
        corpus=CorpusConfig(tuple(corpus), field=field, column=column, strict=strict, suffixes=tuple(suffix)),
        out=out,
        seed=seed,
        force=force,
    )
    ui.report(work(config, progress.on_screen()), json, title=f"Filled into {out}")
