"""How the command line speaks: data to stdout, everything else to stderr; colour only where it is welcome."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engram import EngramError
from engram.cli.sizes import show_bytes, show_seconds


def coloured(stream: Any) -> bool:
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def error(failure: EngramError) -> None:
    """Red `error: …`, a blank line, `hint: …`."""
    red, cyan, end = ("\x1b[31m", "\x1b[36m", "\x1b[0m") if coloured(sys.stderr) else ("", "", "")
    print(f"{red}error:{end} {printable(str(failure))}", file=sys.stderr)
    if failure.hint:
        print(f"\n{cyan}hint:{end} {printable(failure.hint)}", file=sys.stderr)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text of a file as a terminal may have it: no control characters, nothing that UTF-8 cannot say."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def emit(result: Mapping[str, Any]) -> None:
    """Print `result` as the one JSON object of `--json`; NaN and infinity become null, paths become text."""
    text = json.dumps(plain(result), ensure_ascii=False, allow_nan=False)
    print(text.encode("utf-8", "backslashreplace").decode())  # half a surrogate pair: a \u escape, as in JSON


def report(result: Mapping[str, Any], as_json: bool, title: str = "") -> None:
    """The end of every reporting command: the JSON object, or the same fields in words, a line each.

    Nested fields (a curve, a figure per head) are for programs: the words name them and leave them to --json.
    """
    if as_json:
        return emit(result)
    if title:
        print(title)
    flat = {key: value for key, value in result.items() if _depth(value) < 2}
    width = max(map(len, flat), default=0)
    for key, value in flat.items():
        print(f"  {key:<{width}}  {show(key, value)}")
    if nested := [key for key in result if key not in flat]:
        say(f"with --json also: {', '.join(nested)}")


def _depth(value: Any) -> int:
    """0 for one value, 1 for a list or mapping of such, 2 for anything deeper or too long for a line."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return min(2, 1 + max(map(_depth, parts), default=0) + (len(parts) > 32)) if parts else 0


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], to_stderr: bool = False) -> None:
    """A table on stdout (data) or stderr (words beside the data)."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, show_header=any(columns), pad_edge=False)
    for index, column in enumerate(columns):
        numbers = all(row[index].lstrip("+-")[:1].isdigit() or row[index] in ("", "-") for row in rows)
        grid.add_column(column, justify="right" if index and numbers else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(cell.replace("[", r"\[") for cell in row))
    console = Console(stderr=to_stderr, highlight=False)
    if not console.is_terminal:  # a pipe has no width: let no cell be cut
        console.width = max(console.width, 200)
    console.print(grid)


def show(key: str, value: Any) -> str:
    """One value for people; the key tells the unit (`*_bytes`, `seconds`, `*_per_second`)."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, Mapping):
        return "  ".join(f"{name}: {show(key, part)}" for name, part in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(show("", part) for part in value) or "-"
    if isinstance(value, (int, float)):
        if key == "bytes" or key.endswith("_bytes") or key.startswith("bytes_"):
            return show_bytes(value)
        if key == "seconds" or key.endswith("_seconds"):
            return show_seconds(value)
        return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def plain(value: Any) -> Any:
    """What JSON can hold: numpy numbers and paths become plain, NaN and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # a numpy number or array, without importing numpy
        return plain(value.tolist())
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
