"""`engram plan`: where the parts of a model with a memory should live, and what that costs."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from engram.cli import options, progress, ui
from engram.cli.sizes import parse_count, parse_size, show_bytes


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL|PACKAGE", help="Whatever `engram inspect` reads.")],
    ram: Annotated[
        Optional[str],
        typer.Option("--ram", metavar="SIZE", help="RAM that the model may take; default: what is free here."),
    ] = None,
    vram: Annotated[str, typer.Option("--vram", metavar="SIZE", help="Memory of a GPU that it may take.")] = "0",
    disk_iops: Annotated[
        Optional[str],
        typer.Option("--disk-iops", metavar="N", help="Random 4 KiB reads a second of the disk, many under way."),
    ] = None,
    context: Annotated[str, typer.Option("--context", metavar="N", help="Tokens in the key-value cache.")] = "8192",
    measure: Annotated[
        Optional[Path],
        typer.Option(
            "--measure",
            metavar="FOLDER",
            help="Probe the disk of this folder (256 MiB are written there, and removed) and time gathers.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Say where each part of a model should live, and what rows cost there, cold and warm, for each table codec."""
    from engram.runtime.placement import PlacementConfig
    from engram.runtime.placement import plan as work

    iops = None if disk_iops is None else float(parse_count(disk_iops))
    config = PlacementConfig(model, _ram(ram), parse_size(vram), parse_count(context), iops=iops, measure=measure)
    result = work(config, progress.on_screen())
    if result["disk"]["source"] == "default":
        ui.say(f"no --disk-iops and no --measure: taken is {result['disk']['words']}. Many laptops' NVMe disks do "
               "several times as much, hard disks a hundredth.")  # fmt: skip
    ui.emit(result) if json else _show(result)


def _ram(text: str | None) -> int:
    """Bytes; without a text what this machine has free, which is said."""
    if text is not None:
        return parse_size(text)
    from engram.builders.process_memory import available_bytes
    from engram.runtime.placement_cost import PlacementError

    free = available_bytes()
    if free is None:
        raise PlacementError("this system does not say how much memory is free", hint="name it: --ram 16GB")
    ui.say(f"no --ram: taken is what is free on this machine, {show_bytes(free)}")
    return free


def _show(result: dict[str, Any]) -> None:
    parts = [
        [part["part"], "not known" if part["bytes"] is None else show_bytes(part["bytes"]), _place(part),
         part["reason"]]
        for part in result["parts"]
    ]  # fmt: skip
    room = f"{show_bytes(result['ram_bytes'])} of RAM, {show_bytes(result['vram_bytes'])} of VRAM"
    ui.table(f"{result['kind']}, {result['family']}, with {room}", ["part", "size", "where", "why"], parts)
    rows = [
        [entry["codec"] + (" *" if entry["stored"] else ""), f"{entry['row_bytes']:,.0f} B",
         show_bytes(entry["disk_bytes"]), f"{100 * entry['cached_share']:.0f} %", _ms(entry["cold_ms_per_token"]),
         _ms(entry["warm_ms_per_token"]), _span(*entry["cold_ms_per_1000"]),
         _ms(entry["warm_ms_per_1000"])]
        for entry in result["codecs"]
    ]  # fmt: skip
    columns = ["tables as", "row", "on disk", "cached", "token cold", "warm", "prompt cold", "warm"]
    ui.table("What rows take, in ms: a token's, and those of 1,000 prompt tokens (* as stored)", columns, rows)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for line in (*result["words"], f"Disk: {result['disk']['words']}. Warm: {result['gather']['words']}."):
        print(_wrapped(ui.printable(line), width) if width else ui.printable(line))
    if result["left_out"]:
        ui.say(f"left out, their rows do not fit: {', '.join(result['left_out'])}")


def _place(part: dict[str, Any]) -> str:
    if part["place"] == "vram+ram":
        return f"vram {show_bytes(part['vram_bytes'])}, ram {show_bytes(part['ram_bytes'])}"
    return part["place"] or "-"


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _span(least: float, most: float) -> str:
    """Milliseconds, or seconds where they are many, in few columns."""
    if most >= 1e3:
        short = (f"{value / 1e3:.1f}" if value < 1e4 else f"{value / 1e3:.0f}" for value in (least, most))
        return "–".join(dict.fromkeys(short)) + "s"
    return "–".join(dict.fromkeys(map(_ms, (least, most))))


def _wrapped(line: str, width: int) -> str:
    """A line as a paragraph; a number stays with its unit."""
    return textwrap.fill(re.sub(r"(?<=\d) (?=%|[mµ]?s\b|[kMGT]?B\b)", "\N{NO-BREAK SPACE}", line), width)
