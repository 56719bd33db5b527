"""How far a long run came: a small file in its unfinished folder, so that the next run goes on there."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram.builders.atomic import MARK, clear, sync_path, write_whole

VERSION = 1
EVERY_S = 3.0  # seconds between two syncs: what a kill costs at the most


class Journal:
    """What is finished and what is on the disk of the rest: JSON values by name, each written whole.

    `job` is everything that the result depends on; a folder of another job, or without a readable journal, is cleared.
    `said` then says in words what became of an earlier run ("" where there was none).
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self.folder, self.job = folder, dict(job)
        self.notes: dict[str, Any] = {}
        self.said = ""
        self._last = time.monotonic()
        there = any(path.name != MARK for path in folder.iterdir())
        found = _read(folder / MARK)
        if found is not None and found["job"] == json.loads(json.dumps(self.job)):
            self.notes = dict(found["notes"])
            return
        if there:
            changed = [] if found is None else [k for k in {**self.job, **found["job"]} if self._differs(k, found)]
            why = f"other {' and '.join(changed)}" if changed else "it holds nothing to go on from"
            self.said = f"{folder} is from another run ({why}): starting over"
        clear(folder)
        self._write()

    def _differs(self, name: str, found: Mapping[str, Any]) -> bool:
        return bool(json.loads(json.dumps(self.job.get(name))) != found["job"].get(name))

    @property
    def due(self) -> bool:
        """Whether it is time to sync what was written and to note it."""
        return time.monotonic() - self._last >= EVERY_S

    def note(self, name: str, value: Any) -> None:
        """Record a JSON value durably; what it speaks of must be on the disk already."""
        self.notes[name] = value
        self._write()

    def _write(self) -> None:
        write_whole(
            self.folder / MARK,
            (json.dumps({"version": VERSION, "job": self.job, "notes": self.notes}, indent=1) + "\n").encode(),
        )
        sync_path(self.folder)
        self._last = time.monotonic()


def _read(path: Path) -> dict[str, Any] | None:
    """The journal's content, or None where there is none that this release reads."""
    try:
        found = json.loads(path.read_bytes())
        known = found["version"] == VERSION and isinstance(found["job"], dict) and isinstance(found["notes"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if known else None
