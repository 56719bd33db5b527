"""`engram fill`: tables from n-gram statistics of a corpus, without gradients."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from engram.cli import options, progress, ui
from engram.cli.sizes import parse_count


def fill(
    source: Annotated[
        str,
        typer.Argument(
            metavar="LAYOUT|CHECKPOINT|RECIPE", help="What to fill: a layout folder, a checkpoint, or a recipe."
        ),
    ],
    corpus: Annotated[
        list[str], typer.Option("--corpus", help="Files, folders or globs to count; repeatable.", metavar="CORPUS")
    ],
    out: options.Out,
    backbone: Annotated[
        Optional[str],
        typer.Option(metavar="SOURCE", help="With a layout: the transformer (a folder, a .gguf, or a hub name)."),
    ] = None,
    dev: Annotated[
        Optional[list[str]],
        typer.Option(metavar="CORPUS", help="Fit and report on this text instead of a part of the corpus; repeatable."),
    ] = None,
    max_tokens: Annotated[Optional[str], typer.Option(metavar="N", help="Count no more tokens than this.")] = None,
    dev_tokens: Annotated[
        str, typer.Option(metavar="N", help="Tokens of the split that scales are fitted on.")
    ] = "16k",
    test_tokens: Annotated[str, typer.Option(metavar="N", help="Tokens of the split that is reported.")] = "16k",
    strength: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the fitted scales to use; less is kinder to other text.")
    ] = 1.0,
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
        backbone=backbone,
        dev=CorpusConfig(tuple(dev), field, column, strict, tuple(suffix)) if dev else None,
        max_tokens=None if max_tokens is None else parse_count(max_tokens),
        dev_tokens=parse_count(dev_tokens),
        test_tokens=parse_count(test_tokens),
        strength=strength,
        seed=seed,
        force=force,
    )
    ui.report(work(config, progress.on_screen()), json, title=f"Filled into {out}")
