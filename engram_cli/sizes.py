"""Sizes and times as people write them: `512MB`, `2GiB`, `90s`, `1h30m`."""

from __future__ import annotations

import re

import typer

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_size(text: str) -> int:
    """Bytes of `text`: a number and an optional unit, decimal (kB, MB, GB, TB) or binary (KiB, MiB, GiB, TiB).

    Raises typer.BadParameter (a usage error, exit 2) for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"`{text}` is not a size; write for example 512MB, 2GiB or 1000000")
    return int(float(match[1]) * UNITS[(match[2] or "").lower()])


def parse_count(text: str) -> int:
    """A whole number, with an optional k, M, G or T: `20M` is 20,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt])?", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"`{text}` is not a count; write for example 500000, 300k or 20M")
    return int(float(match[1]) * UNITS[(match[2] or "").lower()])


def parse_seconds(text: str) -> float:
    """Seconds of `text`: a bare number, or numbers with s, m, h, d in any order (`1h30m`)."""
    text = text.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if not re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text):
        raise typer.BadParameter(f"`{text}` is not a time; write for example 90s, 15m or 1h30m")
    return sum(float(number) * SECONDS[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([smhd])", text))


def parse_ints(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas: `2,3`; an empty text is an empty tuple."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"`{text}` is not a list of whole numbers; write for example 2,3") from None


def parse_rows(text: str) -> int | None:
    """Rows per head: a count, or `auto` (None: chosen from the corpus)."""
    return None if text.strip().lower() == "auto" else parse_count(text)


def show_count(number: float) -> str:
    """`12,345` below a million, then `1.23M`, `4.56G`: short enough for a progress line."""
    for unit, letter in ((1e9, "G"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.2f}{letter}"
    return f"{number:,.0f}"


def show_bytes(number: float) -> str:
    """Decimal bytes for people: `98.4 MB`."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:.0f} B"


def show_seconds(seconds: float) -> str:
    """`4.2 s`, `3:07`, `1:02:33`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
