"""Whether a file's pages are in the page cache: make it so, and prove it with mincore. Linux; elsewhere it says so.

Linux answers mincore truly only for files that this user owns or may write; for others every page looks resident, so
that coldness is refused there, never believed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram import EngramError

PAGE = mmap.PAGESIZE
COLD_SHARE = 0.001  # at most this share of a cold file may be resident
_WINDOW = 1 << 30
_BLOCK = 8 << 20


class ColdnessError(EngramError):
    """A file that could not be made cold or warm, or whose state this system does not tell."""


def resident_pages(path: Path) -> NDArray[np.bool_]:
    """Which pages of a file are in the page cache: bool [P]. The file is mapped for a moment, nothing is read.

    Raises ColdnessError where the system has no mincore.
    """
    mincore = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
    if mincore is None:
        raise ColdnessError("this system has no mincore, so that nothing can be said about its page cache")
    size = path.stat().st_size
    state = np.zeros(-(-size // PAGE), dtype=np.uint8)
    with path.open("rb") as file:
        for begin in range(0, size, _WINDOW):
            length = min(_WINDOW, size - begin)
            with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=begin) as window:
                bytes_seen = np.frombuffer(window, np.uint8)
                part = state[begin // PAGE :]
                failed = mincore(ctypes.c_void_p(bytes_seen.ctypes.data), ctypes.c_size_t(length),
                                 ctypes.c_void_p(part.ctypes.data))  # fmt: skip
                del bytes_seen
            if failed:
                raise ColdnessError(f"mincore failed on {path}: {os.strerror(ctypes.get_errno())}")
    return (state & 1).astype(np.bool_)


def resident_share(path: Path, pages: NDArray[np.int64] | None = None) -> float:
    """The share, 0 to 1, of a file's pages (or of those numbered) that are in the page cache."""
    state = resident_pages(path)
    chosen = state if pages is None else state[pages]
    return float(chosen.mean()) if chosen.size else 0.0


def make_cold(path: Path, *, patience_s: float = 3.0) -> float:
    """Drop a file from the page cache; the share of it that is still resident, proven to be at most COLD_SHARE.

    Mappings of this process must be closed or trimmed before. Raises ColdnessError where pages stay.
    """
    if not hasattr(os, "posix_fadvise"):
        raise ColdnessError("this system has no posix_fadvise, so that no file can be dropped from its cache")
    end = time.monotonic() + patience_s
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # pages that are not on the disk yet cannot be dropped
        while True:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            share = resident_share(path)
            if share <= COLD_SHARE:
                return share
            if time.monotonic() > end:
                break
            time.sleep(0.02)
    finally:
        os.close(handle)
    raise ColdnessError(
        f"{path} cannot be made cold: {share:.2%} of its pages stay in the page cache, at most {COLD_SHARE:.1%} may",
        hint="another process may have it mapped, it may lie in memory (tmpfs), or belong to another user; "
        "measure a copy of your own on a disk",
    )


def make_warm(path: Path, pages: NDArray[np.int64] | None = None) -> float:
    """Read a file (or the pages numbered) into the page cache; the share resident afterwards, proven to be all.

    Raises ColdnessError where the kernel dropped some of them again: then there is no room.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        if pages is None:
            buffer = memoryview(bytearray(_BLOCK))
            begin = 0
            while got := os.preadv(handle, [buffer], begin):
                begin += got
        else:
            one = memoryview(bytearray(PAGE))
            for page in np.unique(pages).tolist():
                os.preadv(handle, [one], page * PAGE)
    finally:
        os.close(handle)
    share = resident_share(path, pages)
    if share < 1:
        raise ColdnessError(
            f"{path} cannot be made warm: {share:.2%} of the pages wanted are in the page cache after reading them",
            hint="there is not enough free memory to hold them; measure with --no-warm",
        )
    return share


def device_bytes(path: Path) -> tuple[int, str]:
    """Bytes read from devices so far, and how that is known.

    The kernel's count for this process where it keeps one, else the count of the whole device that holds `path`; the
    difference of two calls is what was read between them.
    """
    try:
        with open("/proc/self/io", "rb", buffering=0) as file:
            return int(file.read(4096).split(b"\nread_bytes:")[1].split()[0]), "/proc/self/io read_bytes"
    except (OSError, IndexError):
        pass
    number = path.stat().st_dev
    stat = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
    try:
        return int(stat.read_text().split()[2]) * 512, "/sys/dev/block stat, sectors read"
    except (OSError, IndexError):
        raise ColdnessError("this system does not count the bytes read from devices") from None
