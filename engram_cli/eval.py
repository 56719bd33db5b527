"""`engram eval`: the quality of a memory, always beside its controls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from engram.cli import options, progress, ui
from engram.cli.sizes import parse_count

ARMS = {
    "backbone": "backbone alone",
    "memory": "with memory",
    "zero_table": "zero table",
    "shuffled_rows": "shuffled rows",
}


def evaluate(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help="A package folder.")],
    data: Annotated[
        list[str], typer.Option("--data", metavar="CORPUS", help="Held-out text: files, folders or globs; repeatable.")
    ],
    max_tokens: Annotated[Optional[str], typer.Option(help="Look at no more tokens than this.", metavar="N")] = None,
    offload: options.Placement = options.Offload.disk,
    verify: options.Verification = options.Verify.first_touch,
    table_io: options.RowIo = options.TableIo.auto,
    seed: options.Seed = 0,
    field: options.Field = "text",
    column: options.Column = "text",
    suffix: options.Suffixes = [],
    strict: options.Strict = False,
    json: options.Json = False,
) -> None:
    """Measure perplexity beside the controls."""
    from engram.builders.corpus import CorpusConfig
    from engram.runtime.evaluate import EvalConfig
    from engram.runtime.evaluate import evaluate as work

    config = EvalConfig(
        package=package,
        data=CorpusConfig(tuple(data), field=field, column=column, strict=strict, suffixes=tuple(suffix)),
        max_tokens=None if max_tokens is None else parse_count(max_tokens),
        offload=offload.value,
        seed=seed,
        verify=verify.value,
        table_io=table_io.value,
    )
    result = work(config, progress.on_screen())
    ui.emit(result) if json else _table(result)


def _table(result: dict[str, Any]) -> None:
    rows = [
        [words, *(f"{result[arm][figure]:.4f}" for figure in ("nll", "ppl", "bpb"))]
        for arm, words in ARMS.items()
        if arm in result
    ]
    ui.table(f"{result['tokens']:,} tokens", ["", "loss (nats)", "perplexity", "bits per byte"], rows)
    low, high = result["gain"]["ci95"]
    print(f"gain over the backbone: {result['gain']['nll']:+.4f} nats a token, 95 % between {low:+.4f} and {high:+.4f}")
