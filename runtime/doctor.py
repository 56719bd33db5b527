"""What this machine and this disk are good for, and what each finding means for reading rows. No torch.

Nothing of the user's is changed: a probe file of its own is written into the folder that is looked at, and removed.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from engram import EngramError, Progress
from engram.builders.process_memory import available_bytes, cached_share, forget_cached
from engram.kernels import dispatch
from engram.kernels.codecs import find_codec
from engram.quantize.mapped import MappedTable
from engram.quantize.package import open_package
from engram.quantize.row_store import RowStoreError, write_table
from engram.runtime.device_probe import DEPTHS, sweep

OK, NOTE, PROBLEM = "ok", "note", "problem"
PROBE_BYTES = 256 << 20
LEAST_PROBE = 16 << 20  # of a table that can be probed in place of a file of our own
DEEP_ENOUGH = 4.0  # times the rate of one read at a time that many at once should reach
LARGE_READ_AHEAD = 128 << 10  # bytes: what Linux has by default
_DEVICES = {"/dev/nvidiactl": "NVIDIA GPU", "/dev/kfd": "AMD GPU"}
_COMPILERS = ("c++", "g++", "clang++")
_LIBRARIES = {
    "torch": "runs models", "triton": "kernels on a GPU", "torchao": "int8 and int4 backbones",
    "llama-cpp-python": "GGUF backbones",
}  # fmt: skip


class DoctorError(EngramError):
    """A place that cannot be looked at."""


def examine(place: Path, seconds: float = 1.0, progress: Progress | None = None) -> dict[str, Any]:
    """The fields of `engram doctor --json`: `findings`, each {what, found, verdict, means}, and the disk's `curve`.

    `place` is a folder, or a package, whose tables are looked at too. With `seconds` 0 the disk is not probed, else
    each queue depth is for so long. Raises DoctorError for a place that is no folder that can be written to.
    """
    seen = progress or Progress()
    if not place.is_dir():
        raise DoctorError(f"{place} is no folder", hint="name the folder where tables lie or shall lie")
    findings = [_kernels(), _compiler(), _memory(), _kernel(), *_libraries(), *_accelerators()]
    findings += [_read_ahead(place)]
    tables = _tables(place)
    findings += [_cached(path) for path in tables]
    with _scratch(place) as folder:
        findings.append(_io_uring(folder))
        curve = None
        if seconds > 0:
            large = next((path for path in tables if path.stat().st_size >= LEAST_PROBE), None)
            with seen.task("probe the disk", len(DEPTHS) * seconds, "s"):
                curve = sweep(large or _probe_file(folder), seconds)
            findings.append(_disk(curve))
    return {"place": str(place), "findings": findings, "curve": curve}


def _finding(what: str, found: str, verdict: str, means: str) -> dict[str, str]:
    return {"what": what, "found": found, "verdict": verdict, "means": means}


def _kernels() -> dict[str, str]:
    name = dispatch.name()
    if name == "reference":
        return _finding("row kernels", name, PROBLEM, "rows are decoded by NumPy, many times slower: install a C++17 "
                        "compiler, then this package again")  # fmt: skip
    paths = ", ".join(path for path in dispatch.available() if path != name)
    return _finding("row kernels", name, OK, f"rows are hashed and decoded in C++; also here: {paths}")


def _compiler() -> dict[str, str]:
    found = [name for name in _COMPILERS if shutil.which(name)]
    means = "the C++ kernels can be built at install" if found else "only ready-built wheels have the C++ kernels"
    return _finding("C++ compiler", ", ".join(found) or "none", OK if found else NOTE, means)


def _memory() -> dict[str, str]:
    free = available_bytes()
    found = "not told" if free is None else f"{free / 1e9:.1f} GB may still be taken"
    return _finding("memory", found, OK if free is None or free > 2e9 else NOTE,
                    "backbone and page cache share it; tables need none of it, but are faster with some")  # fmt: skip


def _kernel() -> dict[str, str]:
    system = platform.system()
    verdict = OK if system == "Linux" else NOTE
    means = "page cache and read-ahead can be told what is coming" if system == "Linux" else (
        "rows are read through plain maps: what Linux is told about coming reads has no counterpart here")  # fmt: skip
    return _finding("system", f"{system} {platform.release()}", verdict, means)


def _libraries() -> Iterator[dict[str, str]]:
    for name, purpose in _LIBRARIES.items():
        try:
            yield _finding(name, version(name), OK, purpose)
        except PackageNotFoundError:
            yield _finding(name, "not installed", NOTE, f"{purpose}: not here")


def _accelerators() -> list[dict[str, str]]:
    found = [what for device, what in _DEVICES.items() if Path(device).exists()]
    means = "its driver is loaded; torch and Triton decide what they can use"
    return [_finding("accelerator", what, OK, means) for what in found] or [
        _finding("accelerator", "none", OK, "everything runs on the CPU; tables need no GPU")
    ]


def _read_ahead(place: Path) -> dict[str, str]:
    """What the kernel reads around a page that nobody gave advice on."""
    number = place.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for folder in (block, block.resolve().parent):
        try:
            size = int((folder / "queue" / "read_ahead_kb").read_text()) << 10
        except (OSError, ValueError):
            continue
        means = "rows are read with advice that turns it off"
        if size > LARGE_READ_AHEAD:
            means += f"; programs that map tables without it read up to {size >> 10:,} KiB for a row of some 100 bytes"
        return _finding("read-ahead", f"{size >> 10:,} KiB", NOTE if size > LARGE_READ_AHEAD else OK, means)
    return _finding("read-ahead", "not told", NOTE, "the device of this folder says nothing of itself")


def _tables(place: Path) -> list[Path]:
    """The table files of a package, the largest first; none for another folder."""
    if not (place / "engram.json").is_file():
        return []
    try:
        with open_package(place):
            return sorted((place / "tables").iterdir(), key=lambda path: -path.stat().st_size)
    except EngramError as wrong:
        raise DoctorError(f"{place} is no sound package: {wrong}", hint=wrong.hint) from None


def _cached(path: Path) -> dict[str, str]:
    share = cached_share(path)
    size = path.stat().st_size
    if share is None:
        return _finding(f"page cache, {path.name}", "not told", NOTE, "this system does not say what it caches")
    means = "rows come from memory" if share > 0.9 else "first reads of rows go to the disk; `engram warm` may help"
    return _finding(f"page cache, {path.name}", f"{share:.0%} of {size / 1e6:,.1f} MB", OK, means)


@contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix=".engram-doctor-", dir=place)
    except OSError as wrong:
        raise DoctorError(f"{place} cannot be written to: {wrong.strerror}", hint="name another folder") from None
    with folder as name:
        yield Path(name)


def _io_uring(folder: Path) -> dict[str, str]:
    """Whether rows of a table there can be read past the page cache."""
    rows = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
    path = folder / "table.safetensors"
    write_table(path, [rows], rows=512, width=64, codec=find_codec("int8"), layer=0)
    wanted = np.arange(0, 512, 7)
    try:
        with MappedTable.open(path, io="uring") as table:
            same = np.array_equal(table.gather(wanted), find_codec("int8").encode(rows)[wanted])
    except RowStoreError as wrong:
        return _finding("io_uring", "no", NOTE, f"{wrong}; rows are read through the page cache (--table-io mmap)")
    if not same:
        return _finding("io_uring", "wrong rows", PROBLEM, "do not use --table-io uring here, and report this")
    return _finding("io_uring", "yes", OK, "--table-io uring reads rows past the page cache, many at once")


def _probe_file(folder: Path) -> Path:
    """A file that is on the disk and not in the page cache."""
    path, block = folder / "probe", os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    forget_cached(path)
    return path


def _disk(curve: dict[str, Any]) -> dict[str, str]:
    rates = curve["reads_per_second"]
    one, best = rates[min(rates)], curve["best"]
    found = ", ".join(f"{rate:,.0f} at depth {depth}" for depth, rate in rates.items())
    means = f"a token's rows, asked for at once, cost about {1e3 * 48 / best:.1f} ms for 48 rows that are not cached"
    verdict = OK
    if best < DEEP_ENOUGH * one:
        verdict, means = NOTE, means + "; many reads at once are little faster than one: a hard disk, or a busy one"
    if not curve["direct"]:
        verdict, means = NOTE, means + "; the file system has no direct reads: the page cache may have helped"
    return _finding("random 4 KiB reads a second", found, verdict, means)
