"""Which of the two inspections a path wants: that of our own artifacts, or that of published checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engram.quantize.inspect import inspect
from engram.quantize.inspect_published import inspect_published


def is_published(path: Path) -> bool:
    """Whether a path is a GGUF, or a folder with a config.json and no manifest of ours."""
    return path.suffix == ".gguf" or (path / "config.json").is_file() and not (path / "engram.json").is_file()


def inspect_any(path: Path) -> dict[str, Any]:
    """The fields of `engram inspect --json`. Raises what `inspect` and `inspect_published` raise."""
    return inspect_published(path) if is_published(path) else inspect(path)
