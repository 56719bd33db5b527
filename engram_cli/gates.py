"""`engram gates`: a text coloured by how far the gate opens at each token and layer."""

from __future__ import annotations

import json as codec
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from engram.cli import options, progress, ui
from engram.cli.run import Engine
from engram.cli.threads import share_processors


class Scale(StrEnum):
    """What the colours reach over."""

    full = "full"
    fit = "fit"


def gates(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help="A package folder.")],
    text: Annotated[Optional[str], typer.Option("--text", metavar="TEXT", help="The text; - reads stdin.")] = None,
    text_file: Annotated[
        Optional[Path], typer.Option("--text-file", metavar="FILE", help="The text, from a UTF-8 file.")
    ] = None,
    html: Annotated[
        Optional[Path],
        typer.Option("--html", metavar="FILE", help="Write a page: one .html file, no network, no script."),
    ] = None,
    png: Annotated[Optional[Path], typer.Option("--png", metavar="FILE", help="Write a picture, a .png file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is already at --html or --png.")] = False,
    scale: Annotated[
        Scale, typer.Option(help="Colours from 0 to 1 (full), or from a layer's lowest gate to its highest (fit).")
    ] = Scale.full,
    offload: options.Placement = options.Offload.disk,
    verify: options.Verification = options.Verify.first_touch,
    table_io: options.RowIo = options.TableIo.auto,
    engine: Annotated[
        Engine, typer.Option(help="What computes the backbone; auto takes llama.cpp for a GGUF, where it is installed.")
    ] = Engine.auto,
    json: options.Json = False,
) -> None:
    """Colour a text by how far the gates open: on the terminal, as a page, as a picture."""
    if (text is None) == (text_file is None):
        raise typer.BadParameter("give either --text or --text-file")
    share_processors(package)
    from engram.runtime.gates import MOST_BYTES, GatesConfig
    from engram.runtime.gates import gates as work

    source: str | Path = text_file if text_file is not None else text or ""
    if source == "-":
        source = sys.stdin.buffer.read(MOST_BYTES + 1).decode("utf-8", "replace")
    config = GatesConfig(
        package=package,
        text=source,
        html=html,
        png=png,
        scale=scale.value,
        force=force,
        offload=offload.value,
        verify=verify.value,
        table_io=table_io.value,
        engine=engine.value,
    )
    result = work(config, progress.on_screen())
    for path in (html, png):
        if path is not None:
            ui.say(f"written: {path}")
    if json:
        ui.emit(result)
    elif html is None and png is None:
        _coloured(result) if ui.coloured(sys.stdout) and _shades() else _plain(result)


def _shades() -> bool:
    """Whether the terminal has more than 16 colours: of those too few are shades of one."""
    from rich.console import Console

    return Console().color_system in ("256", "truecolor")


def _plain(result: dict[str, Any]) -> None:
    """Digits, for a pipe, or where colours are not wanted."""
    names = list(result["layers"])
    rows = [
        [ui.printable(codec.dumps(note["token"], ensure_ascii=False)), str(note["id"]),
         *(f"{note['gates'][name]:.4f}" for name in names)]
        for note in result["tokens"]
    ]  # fmt: skip
    print(_title(result))
    ui.table("", ["token", "id", *(f"layer {name}" for name in names)], rows)


def _coloured(result: dict[str, Any]) -> None:
    """The text once a layer, each token on the colour of its gate."""
    from rich.console import Console
    from rich.text import Text

    from engram.runtime.gates_scale import background, ends, ink, share

    def style(part: float) -> str:
        ground = background(part)
        return "#{:02x}{:02x}{:02x} on #{:02x}{:02x}{:02x}".format(*ink(ground), *ground)

    console = Console(highlight=False)
    console.print(Text(_title(result), "bold"))
    for name, figures in result["layers"].items():
        low, high = ends(figures, result["scale"])
        line = Text(f"\nlayer {name}, mean {figures['mean']:.2%}: ")
        line.append(f"{low:.2%} ")
        for step in range(16):
            line.append(" ", style(step / 15))
        line.append(f" {high:.2%}")
        console.print(line)
        shown = Text()
        for note in result["tokens"]:
            piece = ui.printable(note["text"]) or "·"
            shown.append(piece, style(share(note["gates"][name], low, high)))
        console.print(shown)


def _title(result: dict[str, Any]) -> str:
    codecs = ", ".join(result["codecs"])
    return ui.printable(f"How far the gates open: {result['package']}, {result['backbone']}, rows in {codecs}")
