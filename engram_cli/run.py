"""`engram run`: text from a package; a chat when there is no prompt."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from engram.cli import options, progress, ui
from engram.cli.sizes import parse_size, show_bytes
from engram.cli.threads import share_processors

if TYPE_CHECKING:
    from engram.runtime.generate import RunConfig


class Engine(StrEnum):
    """What computes the backbone."""

    auto = "auto"
    torch = "torch"
    llama = "llama"


def run(
    package: Annotated[
        Path, typer.Argument(metavar="PACKAGE", help="A package folder, or a GGUF with a memory of its own.")
    ],
    prompt: Annotated[
        Optional[str], typer.Option("--prompt", metavar="TEXT", help="Text to go on from; - reads stdin.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    offload: options.Placement = options.Offload.disk,
    table_cache: Annotated[
        Optional[str], typer.Option(metavar="SIZE", help="For disk: the most bytes of tables that may stay resident.")
    ] = None,
    verify: options.Verification = options.Verify.first_touch,
    table_io: options.RowIo = options.TableIo.auto,
    engine: Annotated[
        Engine, typer.Option(help="What computes the backbone; auto takes llama.cpp for a GGUF, where it is installed.")
    ] = Engine.auto,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to write at most.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 takes the likeliest token.", min=0.0)] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sample from the likeliest tokens of this share.", min=0.0, max=1.0)
    ] = 1.0,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Write on from a prompt, or chat when there is none."""
    share_processors(package)
    from engram.runtime.generate import RunConfig
    from engram.runtime.generate import run as work

    if prompt == "-" or (prompt is None and (json or not sys.stdin.isatty())):
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace")
    config = RunConfig(
        package=package,
        prompt=prompt,
        offload=offload.value,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        table_cache=None if table_cache is None else parse_size(table_cache),
        chat=chat,
        verify=verify.value,
        table_io=table_io.value,
        engine=engine.value,
    )
    if prompt is None:
        return _converse(config)
    result = work(config, _silent if json else _stream, progress.on_screen())
    ui.emit(result) if json else _figures(result)


def _converse(config: RunConfig) -> None:
    from engram.runtime.generate import open_session

    conversation = open_session(config, progress.on_screen())
    ui.say("an empty line or Ctrl-D ends the chat")
    while line := _ask():
        _figures(conversation.turn(line, _stream))


def _ask() -> str:
    try:
        return input("\n> ").strip()
    except EOFError:
        return ""


def _stream(text: str) -> None:
    print(text, end="", flush=True)


def _silent(text: str) -> None:
    """With --json the text comes once, inside the object."""


def _figures(result: dict[str, Any]) -> None:
    print(flush=True)
    ui.say(
        f"prefill {result['prefill_tokens_per_second']:,.1f} tokens/s, decode"
        f" {result['decode_tokens_per_second']:,.1f} tokens/s, {result['rows_read']:,} rows"
        f" ({show_bytes(result['bytes_read'])}) read, {show_bytes(result['peak_rss_bytes'])} resident at most,"
        f" backbone: {result['engine']}, rows: {result['row_io']}, {result['kernels']}"
    )
