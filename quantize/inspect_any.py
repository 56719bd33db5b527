"""Which inspection a path or name wants: of our own artifacts, of published checkpoints here, or of those elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engram import Progress
from engram.builders.families.known import is_published
from engram.quantize.inspect import inspect
from engram.quantize.inspect_published import inspect_published, inspect_remote


def is_elsewhere(name: str) -> bool:
    """A URL, or what is no path here: a hub name, or nothing."""
    return name.startswith(("https://", "http://")) or not os.path.lexists(name)


def inspect_any(name: str, progress: Progress = Progress()) -> dict[str, Any]:
    """The fields of `engram inspect --json` of a path, hub name or URL. Raises what the inspection of its kind does."""
    if is_elsewhere(name):
        return inspect_remote(name, progress)
    path = Path(name)
    return inspect_published(path) if is_published(path) else inspect(path)
