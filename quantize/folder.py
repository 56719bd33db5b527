"""Folders made from folders: where one may be written, and copies that prove themselves."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from engram import EngramError, Progress
from engram.builders.atomic import check_replaceable

_BLOCK = 1 << 20


def check_target(source: Path, out: Path, *, force: bool, error: type[EngramError]) -> None:
    """Refuse an `out` that would overwrite its own source, or something that is no artifact of ours."""
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise error(f"--out {out} and its source {source} lie in one another", hint="choose a folder of its own")
    check_replaceable(out, force=force, error=error)


def rejected_name(out: Path) -> Path:
    """Where an artifact is kept that its quality gate refused."""
    return out.with_name(out.name + ".rejected")


def copy_hashed(source: Path, target: Path, progress: Progress | None = None) -> str:
    """Copy a file's content and return the SHA-256 of what was written."""
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        source.open("rb") as reading,
        target.open("wb") as writing,
        (progress or Progress()).task(f"copy {source.name}", source.stat().st_size, "B") as task,
    ):
        while block := reading.read(_BLOCK):
            digest.update(block)
            writing.write(block)
            task.advance(len(block))
    return digest.hexdigest()


def is_plain(name: str) -> bool:
    """Whether a file name of a manifest stays inside its folder."""
    path = PurePosixPath(name)
    return path.as_posix() == name and not path.is_absolute() and ".." not in path.parts and "\\" not in name
