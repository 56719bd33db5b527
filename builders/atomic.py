"""Written whole or not at all: a temporary name in the same folder, flushed to the disk, then renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engram import EngramError

MANIFESTS = ("engram.json", "layout.json")  # one of them makes a folder an artifact of ours


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that appears under its name only when all of it is on the disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def check_replaceable(out: Path, *, force: bool, error: type[EngramError]) -> None:
    """Refuse an `out` that exists, or with `force` one that is no artifact of ours: call it before the work begins."""
    if not out.name:
        raise error(f"--out {out} has no name of its own", hint="name a folder")
    if not out.exists():
        return
    if not force:
        raise error(f"{out} exists", hint="choose another --out, or pass --force to replace it")
    ours = out.is_dir() and (not any(out.iterdir()) or any((out / name).is_file() for name in MANIFESTS))
    if out.is_symlink() or not ours:
        raise error(f"{out} is not an engram folder, --force does not replace it", hint="remove it yourself")


@contextmanager
def atomic_folder(out: Path, *, force: bool = False, error: type[EngramError] = EngramError) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends, or is removed when the block fails.

    Files are flushed to the disk before the rename; with `force` an existing `out` is replaced in the last step.
    """
    check_replaceable(out, force=force, error=error)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_tree(partial)
    put_in_place(partial, out)


@contextmanager
def resumable_folder(out: Path, *, force: bool = False, error: type[EngramError] = EngramError) -> Iterator[Path]:
    """As `atomic_folder`, for long work: what an interrupted run left is still in the folder.

    The caller goes on with it or calls `clear`. When the block fails, the folder is removed for an EngramError (to run
    again would fail again) and stays for anything else: Ctrl-C, a full disk, a kill. One process at a time: while
    another one writes there, `error` is raised.
    """
    check_replaceable(out, force=force, error=error)
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = _locked(partial, error)
    try:
        try:
            yield partial
        except EngramError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_tree(partial)
        put_in_place(partial, out)
    finally:
        os.close(lock)


def _locked(folder: Path, error: type[EngramError]) -> int:
    """An open handle of the folder that no other process can lock; the lock ends with the process at the latest."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.path.samestat(os.fstat(handle), folder.stat())  # the other one may just have put it in place
    except (BlockingIOError, FileNotFoundError):
        same = False
    except OSError:
        same = True  # a file system without locks
    if not same:
        os.close(handle)
        raise error(f"{folder} is being written by another process", hint="wait for it, or choose another --out")
    return handle


def clear(folder: Path) -> None:
    """Remove everything in a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def put_in_place(finished: Path, out: Path) -> None:
    """Rename a folder that is on the disk to `out`; an older `out` goes only when the new one stands."""
    old = out.with_name(out.name + ".old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    finished.rename(out)
    sync_path(out.parent)
    shutil.rmtree(old, ignore_errors=True)


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
