"""Written whole or not at all: a temporary name in the same folder, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engram import EngramError


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that appears under its name only when all of it is on the disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def atomic_folder(out: Path, *, force: bool = False, error: type[EngramError] = EngramError) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends, or is removed when the block fails.

    Files are flushed to the disk before the rename; with `force` an existing `out` is replaced in the last step.
    """
    if out.exists() and not force:
        raise error(f"{out} exists", hint="choose another --out, or pass --force to replace it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_tree(partial)
    if out.exists():
        old = out.with_name(out.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)
    else:
        partial.rename(out)
    sync_path(out.parent)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below, and the folder itself."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync_path(path)
    sync_path(folder)


def sync_path(path: Path) -> None:
    """Flush one file, or a folder's entries, so that a rename survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
