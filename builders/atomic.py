"""Written whole or not at all: a temporary name in the same folder, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engram import EngramError

MARK = "unfinished.json"  # in every folder that is being written: what has none is not ours to remove
MANIFESTS = ("engram.json", "layout.json")  # one of them makes a folder an artifact of ours


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that appears under its name only when all of it is on the disk."""
    partial = _partial(path)
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


@dataclass
class Unfinished:
    """A folder that is being written: what becomes of it when the block ends.

    `out` is where it goes. `keep`: it stays, to go on from, also when an EngramError ends the work.
    """

    folder: Path
    out: Path
    keep: bool = False


@contextmanager
def atomic_folder(out: Path, *, force: bool = False, error: type[EngramError] = EngramError) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends, or is removed when the block fails.

    Files are flushed to the disk before the rename; with `force` an existing `out` is replaced in the last step.
    """
    with resumable_folder(out, force=force, error=error) as work:
        clear(work.folder)
        try:
            yield work.folder
        except BaseException:
            shutil.rmtree(work.folder, ignore_errors=True)
            raise


@contextmanager
def resumable_folder(out: Path, *, force: bool = False, error: type[EngramError] = EngramError) -> Iterator[Unfinished]:
    """As `atomic_folder`, for long work: what an interrupted run left is still in the folder.

    The caller goes on with it or calls `clear`. When the block fails, the folder is removed for an EngramError (to run
    again would fail again) unless `keep` is set, and stays for anything else: Ctrl-C, a full disk, a kill. One process
    at a time: while another one writes there, `error` is raised; and for a folder of that name that is not ours.
    """
    check_replaceable(out, force=force, error=error)
    work = Unfinished(_partial(out), out)
    lock = _locked(work.folder, error)
    try:
        _mark(work.folder, error)
        try:
            yield work
        except EngramError:
            if not work.keep:
                shutil.rmtree(work.folder, ignore_errors=True)
            raise
        sync_tree(work.folder)
        put_in_place(work.folder, work.out)
        (work.out / MARK).unlink(missing_ok=True)  # last: a kill before that leaves a folder that is known as ours
    finally:
        os.close(lock)


def is_unfinished(out: Path) -> bool:
    """Whether an earlier run to `out` left a folder to go on in."""
    return (_partial(out) / MARK).is_file()


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _locked(folder: Path, error: type[EngramError]) -> int:
    """An open handle of the folder, made if need be, that no other process can lock; it ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (FileExistsError, NotADirectoryError):
        raise error(f"{folder} is no folder", hint="remove it, or choose another --out") from None
    except OSError as wrong:
        if wrong.errno != errno.ELOOP:
            raise
        raise error(f"{folder} is a link", hint="remove it, or choose another --out") from None
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


def _mark(folder: Path, error: type[EngramError]) -> None:
    """Make an empty folder known as ours; refuse one that holds something else."""
    if (folder / MARK).is_file():
        return
    if any(folder.iterdir()):
        raise error(f"{folder} holds files, but not of an unfinished run", hint="move it away, or choose another --out")
    write_whole(folder / MARK, b"{}\n")


def clear(folder: Path) -> None:
    """Remove everything in an unfinished folder but its mark."""
    for path in folder.iterdir():
        if path.name != MARK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def put_in_place(finished: Path, out: Path) -> None:
    """Rename a folder that is on the disk to `out`; an older `out` goes only when the new one stands."""
    old = None
    if out.exists():
        names = (out.with_name(out.name + ".old" + (f"-{n}" if n else "")) for n in itertools.count())
        old = next(name for name in names if not os.path.lexists(name))  # what is there already is not ours to remove
        out.rename(old)
    try:
        finished.rename(out)
    except OSError:
        if old is not None:
            old.rename(out)
        raise
    sync_path(out.parent)
    if old is not None:
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
