"""`engram build-vocab`: a corpus and a tokenizer in, a layout folder out."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from engram.cli import options, progress, ui
from engram.cli.sizes import parse_ints, parse_rows, parse_size


def build_vocab(
    corpus: options.Sources,
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer", metavar="SOURCE", help="tokenizer.json, a folder that holds one, a .gguf, or a hub name."
        ),
    ],
    out: options.Out,
    dialect: Annotated[options.Dialect, typer.Option(help="Which published hashing to follow.")] = options.Dialect.demo,
    orders: Annotated[str, typer.Option(help="N-gram orders.", metavar="N,N")] = "2,3",
    heads: Annotated[int, typer.Option(metavar="N", help="Hash heads per order.", min=1)] = 8,
    rows_per_head: Annotated[
        str, typer.Option(help="Rows per head, or auto: from the corpus.", metavar="N|auto")
    ] = "auto",
    budget: Annotated[
        Optional[str],
        typer.Option(help="For auto: the most bytes all tables may take as float32; default: 2GiB.", metavar="SIZE"),
    ] = None,
    target_collisions: Annotated[
        Optional[float],
        typer.Option(
            metavar="SHARE", help="For auto: the share of distinct n-grams that may share a row; default: 0.5."
        ),
    ] = None,
    head_dim: Annotated[int, typer.Option(metavar="N", help="Width of one row.", min=1)] = 64,
    layers: Annotated[str, typer.Option(help="Blocks (from 0) that get a memory.", metavar="L,L")] = "1,15",
    seed: options.Seed = 0,
    pad_id: Annotated[
        Optional[int], typer.Option(help="Raw id before a document's start; default: 2, or the reset id.")
    ] = None,
    reset_id: Annotated[
        Optional[int], typer.Option(help="Raw id that ends a document: no n-gram reaches across.")
    ] = None,
    dead_ids: Annotated[str, typer.Option(help="Raw ids that hash as padding.", metavar="I,I")] = "",
    compress: Annotated[bool, typer.Option("--compress/--no-compress", help="Merge tokens that read alike.")] = True,
    top: Annotated[int, typer.Option(metavar="N", help="Frequent n-grams to keep per order.", min=0)] = 65536,
    field: options.Field = "text",
    column: options.Column = "text",
    suffix: options.Suffixes = [],
    strict: options.Strict = False,
    workers: Annotated[
        Optional[int], typer.Option(metavar="N", help="Threads of the tokenizer; default: one per core.", min=1)
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Lay out a memory: compressed vocabulary, hash tables, statistics."""
    from engram.builders.build_vocab import BuildVocabConfig
    from engram.builders.build_vocab import build_vocab as work
    from engram.builders.corpus import CorpusConfig

    config = BuildVocabConfig(
        corpus=CorpusConfig(tuple(corpus), field=field, column=column, strict=strict, suffixes=tuple(suffix)),
        tokenizer=tokenizer,
        out=out,
        dialect=dialect.value,
        orders=parse_ints(orders),
        heads=heads,
        rows_per_head=parse_rows(rows_per_head),
        budget_bytes=None if budget is None else parse_size(budget),
        target_collisions=target_collisions,
        head_dim=head_dim,
        layers=parse_ints(layers),
        seed=seed,
        pad_id=pad_id,
        compress=compress,
        reset_id=reset_id,
        dead_ids=parse_ints(dead_ids),
        top=top,
        force=force,
        workers=workers,
    )
    ui.report(work(config, progress.on_screen()), json, title=f"Layout in {out}")
