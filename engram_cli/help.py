"""The help text of every command as one page: `python -m engram.cli.help docs/cli.md`. A test holds the page to it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

HEAD = """# Every command and its options

This page is the live `--help` of each command; `make docs` writes it again and a test compares. Data goes to stdout and
words to stderr; `--json` prints one JSON object; exit codes: 0 done, 1 an error you can act on, 2 wrong usage,
130 interrupted. Sizes: `512MB`, `2GiB`. Counts: `300k`, `20M`. Times: `90s`, `15m`, `1h30m`.
"""


def help_of(words: list[str]) -> str:
    """What `engram WORDS --help` prints, at 100 columns."""
    from engram.cli.main import app

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        app([*words, "--help"], prog_name="engram")
    return text.getvalue()


def command_names() -> list[list[str]]:
    """The words of every command, groups opened: [["build-vocab"], …, ["recipe", "ls"], …]."""
    import typer.main

    from engram.cli.main import app

    names: list[list[str]] = []

    def walk(words: list[str], command: object) -> None:
        parts: dict[str, object] = getattr(command, "commands", {})
        if not parts:
            names.append(words)
        for name, part in parts.items():
            walk([*words, name], part)

    walk([], typer.main.get_command(app))
    return names


def page() -> str:
    """The whole of docs/cli.md."""
    os.environ["COLUMNS"] = "100"
    parts = [HEAD]
    for words in [[], *command_names()]:
        parts.append(f"## `{' '.join(['engram', *words])}`\n\n```text\n{help_of(words).strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), "utf-8")
