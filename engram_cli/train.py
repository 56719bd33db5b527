"""`engram train`: train a memory on a backbone, or a whole model from scratch, as a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from engram.cli import options, progress, ui
from engram.cli.sizes import parse_count, parse_seconds


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one (engram recipe ls).")
    ],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(metavar="KEY=VALUE", help="Values to change, e.g. optimizer.lr=1e-3.")
    ] = None,
    out: Annotated[
        Optional[Path], typer.Option("--out", metavar="PATH", help="Where to write; the same as out=PATH.")
    ] = None,
    resume: Annotated[
        Optional[str], typer.Option("--resume", metavar="auto|PATH", help="Go on from the newest state, or from PATH.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would need (parameters, memory, tokens/s) and stop.")
    ] = False,
    max_tokens: Annotated[Optional[str], typer.Option(help="Stop after so many tokens.", metavar="N")] = None,
    max_steps: Annotated[Optional[int], typer.Option(metavar="N", help="Stop after so many steps.", min=0)] = None,
    max_time: Annotated[Optional[str], typer.Option(help="Stop after so long (90s, 15m, 2h).", metavar="TIME")] = None,
    json: options.Json = False,
) -> None:
    """Train as a recipe says; --resume auto goes on after a kill."""
    from engram.builders.train import train as work

    result = work(
        recipe,
        [*(overrides or []), *([f"out={out}"] if out else [])],
        resume=resume,
        dry_run=dry_run,
        progress=progress.on_screen(),
        max_tokens=None if max_tokens is None else parse_count(max_tokens),
        max_steps=max_steps,
        max_time=None if max_time is None else parse_seconds(max_time),
    )
    ui.report(result, json, title="Trained" if not dry_run else "Would train")
