"""How much memory this process holds and may still take; what the page cache holds of a file."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path


def available_bytes() -> int | None:
    """Bytes that can still be allocated, as far as the system tells; None where it tells nothing."""
    found = [value for value in (_machine(), _container(), *_process()) if value is not None]
    return max(0, min(found)) if found else None


def resident_bytes() -> dict[str, int]:
    """Resident memory of this process now (all, anonymous, mapped files) and the highest so far, in bytes.

    The highest is the kernel's VmHWM: getrusage's figure is inherited from the parent through fork and exec.
    """
    fields = _fields("/proc/self/status")
    if "VmHWM" not in fields:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        fields["VmHWM"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    names = {"rss_bytes": "VmRSS", "rss_anon_bytes": "RssAnon", "rss_file_bytes": "RssFile", "peak_rss_bytes": "VmHWM"}
    return {name: fields.get(field, 0) for name, field in names.items()}


def mapped_resident_bytes(paths: Iterable[Path]) -> int | None:
    """Resident bytes of this process's mappings of some files; None where the system does not tell."""
    wanted = {str(path.resolve()) for path in paths}
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return None
    total, inside = 0, False
    for line in lines:
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):  # the first line of a mapping: addresses, permissions, offset, device, inode, path
            inside = rest.split(maxsplit=4)[-1] in wanted
        elif inside and name == "Rss:":
            total += int(rest.split()[0]) * 1024
    return total


def is_mapped(path: Path) -> bool:
    """Whether this process maps a file; False where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return False
    return str(path.resolve()) in {line.split(maxsplit=5)[-1] for line in lines}


def forget_cached(path: Path) -> None:
    """Tell the kernel that the cached pages of a file are not needed again; pages that a process has mapped in stay."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def cached_bytes(path: Path) -> int | None:
    """Bytes of a file that are in the page cache (mincore); None where the system does not tell."""
    size = path.stat().st_size
    return 0 if not size else _cached(path, size, [(0, size)])


def cached_share(path: Path, samples: int = 256) -> float | None:
    """About which share of a file is cached, judged from evenly spaced pages; None where the system does not tell."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    chosen = range(0, pages, max(1, pages // samples))
    found = _cached(path, size, [(page * mmap.PAGESIZE, 1) for page in chosen]) if size else None
    return None if found is None else found / (len(chosen) * mmap.PAGESIZE)


def _cached(path: Path, size: int, spans: list[tuple[int, int]]) -> int | None:
    """Bytes of the cached pages in (offset, length) spans of a file."""
    if not sys.platform.startswith("linux"):
        return None
    mincore = ctypes.CDLL(None).mincore
    total = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        begin = (ctypes.c_char * size).from_buffer(mapped)
        try:
            for offset, length in spans:
                pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
                if mincore(ctypes.c_void_p(ctypes.addressof(begin) + offset), ctypes.c_size_t(length), pages):
                    return None
                total += bytes(pages).count(1)
        finally:
            del begin  # the map cannot be closed before
    return total * mmap.PAGESIZE


def _fields(path: str) -> dict[str, int]:
    """`Name:  123 kB` lines of a proc file, in bytes."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    words = [line.replace(":", " ").split() for line in lines]
    return {word[0]: int(word[1]) * 1024 for word in words if len(word) == 3 and word[2] == "kB" and word[1].isdigit()}


def _machine() -> int | None:
    return _fields("/proc/meminfo").get("MemAvailable")


def _container() -> int | None:
    """Room left in the cgroup (version 2) that bounds this process; page cache counts as room."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(stat.get("file", 0))


def _process() -> list[int | None]:
    """Room left under RLIMIT_DATA and RLIMIT_AS."""
    try:
        import resource
    except ImportError:  # not a Unix
        return []
    used = _fields("/proc/self/status")
    out: list[int | None] = []
    for limit, name in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft = resource.getrlimit(limit)[0]
        out.append(None if soft == resource.RLIM_INFINITY else soft - used.get(name, 0))
    return out
