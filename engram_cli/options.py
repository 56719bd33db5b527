"""Options that several commands share, spelled once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is already at --out.")]
Out = Annotated[Path, typer.Option("--out", metavar="PATH", help="Where to write; made whole or not at all.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of everything random.")]
Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="CORPUS",
        help="Files, folders, globs, or - for stdin: .txt .md .jsonl .jsonl.gz .jsonl.zst .parquet.",
        show_default=False,
    ),
]
Field = Annotated[str, typer.Option("--field", metavar="NAME", help="The field of a JSON line that holds the text.")]
Column = Annotated[
    str, typer.Option("--column", metavar="NAME", help="The column of a parquet file that holds the text.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first malformed line or undecodable byte.")]
Suffixes = Annotated[
    list[str],
    typer.Option(
        "--suffix", metavar=".EXT", help="Another ending to read as plain text in folders (.rst, .py); repeatable."
    ),
]


class Dialect(StrEnum):
    """The published ways to hash n-grams into rows."""

    demo = "demo"
    v41 = "v41"
    qwen_ple = "qwen-ple"


class Offload(StrEnum):
    """Where the tables live while a model runs."""

    none = "none"
    ram = "ram"
    disk = "disk"


Placement = Annotated[
    Offload,
    typer.Option("--offload", help="Tables as float32 (none), as stored bytes (ram), or mapped from the file (disk)."),
]


class Verify(StrEnum):
    """When the checksums of a table's pages are compared."""

    first_touch = "first-touch"
    open = "open"
    off = "off"


class TableIo(StrEnum):
    """How rows are read from table files."""

    auto = "auto"
    mmap = "mmap"
    uring = "uring"
    pread = "pread"


Verification = Annotated[
    Verify,
    typer.Option("--verify", help="Compare a page's checksum when a row of it is first used, all at open, or never."),
]
RowIo = Annotated[
    TableIo,
    typer.Option(
        "--table-io", help="For disk: how rows are read. uring goes past the page cache; auto takes the best there is."
    ),
]
