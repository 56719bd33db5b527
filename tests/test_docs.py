"""What the documents say is what the program does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engram import __version__
from engram.cli.help import command_names, help_of, page
from engram.kernels.codecs import CODECS, CodecError, find_codec

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("quantize/*.md")]
NAMES = [" ".join(words) for words in command_names()]


def commands_in(text: str) -> list[str]:
    """Every `engram …` line of the fenced blocks of a page, backslash lines joined, comments dropped."""
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.split(" #")[0] for line in lines if re.match(r"(\.venv/bin/)?engram ", line)]


def test_cli_page_is_the_live_help() -> None:
    assert (ROOT / "docs" / "cli.md").read_text("utf-8") == page(), "run `make docs`"


@pytest.mark.parametrize("path", PAGES, ids=[path.name for path in PAGES])
def test_commands_in_documents_exist(path: Path) -> None:
    for line in commands_in(path.read_text("utf-8")):
        words = line.split("engram ", 1)[1].split()
        name = next((name for name in NAMES if " ".join(words).startswith(name)), "")
        if words[0].startswith("-"):
            continue
        assert name, f"{path.name}: `{line}` names no command"
        known = set(re.findall(r"--[a-z][a-z-]*", help_of(name.split())))
        used = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
        assert used <= known, f"{path.name}: `{line}` uses {sorted(used - known)}"


@pytest.mark.parametrize("path", PAGES, ids=[path.name for path in PAGES])
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_table_of_codecs_is_what_the_codecs_say() -> None:
    text = (ROOT / "docs" / "codecs.md").read_text("utf-8")
    lines = re.findall(r"^\| `([^`]+)` \| (\d+) \| (\d+) \| ([\d., ]+) \| ([^|]+) \|", text, re.MULTILINE)
    assert sorted(name for name, *_ in lines) == sorted(CODECS)
    for name, narrow, wide, bits, widths in lines:
        codec = find_codec(name + ":3f800000" if name in ("fp8-tensor", "nvfp4") else name)
        assert (codec.row_bytes(64), codec.row_bytes(256)) == (int(narrow), int(wide)), name
        assert list(dict.fromkeys([codec.row_bytes(64) / 8, codec.row_bytes(256) / 32])) == [
            float(part) for part in bits.split(",")
        ], name
        step = {"any": 1, "even": 2}.get(widths) or int(widths.removeprefix("multiples of "))
        codec.row_bytes(3 * step)
        if step > 1:
            with pytest.raises(CodecError):
                codec.row_bytes(3 * step + step // 2)


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for path in PAGES:
        used = set(re.findall(r"`make ([a-z-]+)", path.read_text("utf-8")))
        assert used <= targets, f"{path.name}: make {sorted(used - targets)}"


def test_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert versions[0] == __version__


def test_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
