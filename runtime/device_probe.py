"""What the device can do: raw random 4 KiB reads of a file, past the page cache, at several queue depths.

`python -m engram.runtime.device_probe FILE DEPTH SECONDS SEED` is one process of the probe. Threads of one process
take turns at the interpreter lock, so that a depth is spread over as many processes as there are processors.
"""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engram import EngramError

PAGE = 4096
DEPTHS = (1, 8, 32, 128)
_PROCESSES = 4  # at most


class ProbeError(EngramError):
    """A file whose device cannot be probed."""


def sweep(path: Path, seconds: float, depths: Sequence[int] = DEPTHS, seed: int = 0) -> dict[str, Any]:
    """Reads a second at each depth: {"reads_per_second": {depth: rate}, "best": rate, "direct": bool}.

    `direct` is false where the file system has no direct reads; then the file should be cold, and the rates are of
    buffered reads. Raises ProbeError for a file that is too small or cannot be read.
    """
    if path.stat().st_size < 2 * PAGE:
        raise ProbeError(f"{path} has {path.stat().st_size} bytes, a probe of 4 KiB reads needs more")
    direct = _opens_direct(path)
    rates = {depth: _at_depth(path, depth, seconds, seed + place) for place, depth in enumerate(depths)}
    return {"reads_per_second": rates, "best": max(rates.values()), "direct": direct, "read_bytes": PAGE}


def _at_depth(path: Path, depth: int, seconds: float, seed: int) -> float:
    processes = max(1, min(depth, os.cpu_count() or 1, _PROCESSES))
    threads = [depth // processes + (place < depth % processes) for place in range(processes)]
    begun = [
        subprocess.Popen(
            [sys.executable, "-m", "engram.runtime.device_probe", str(path), str(count), str(seconds),
             str(seed * _PROCESSES + place)],
            stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_root()), os.environ.get("PYTHONPATH", "")])},
        )
        for place, count in enumerate(threads)
    ]  # fmt: skip
    try:
        answers = [process.communicate(timeout=60 + 10 * seconds)[0] for process in begun]
    finally:
        for process in begun:
            if process.poll() is None:
                process.kill()
                process.wait()
    if any(process.returncode for process in begun):
        raise ProbeError(f"{path} could not be probed", hint="see the words above")
    return sum(map(float, answers))


def _root() -> Path:
    """The folder that holds the package `engram`."""
    import engram

    return Path(engram.__file__).resolve().parents[1]


def _opens_direct(path: Path) -> bool:
    handle = _open(path)
    try:
        return bool(hasattr(os, "O_DIRECT") and _flags(handle) & os.O_DIRECT)
    finally:
        os.close(handle)


def _flags(handle: int) -> int:
    import fcntl

    return fcntl.fcntl(handle, fcntl.F_GETFL)


def _open(path: Path) -> int:
    """Open for direct reads, or for buffered ones where the file system refuses them."""
    if hasattr(os, "O_DIRECT"):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return os.open(path, os.O_RDONLY)
        try:
            os.preadv(handle, [mmap.mmap(-1, PAGE)], 0)
            return handle
        except OSError:
            os.close(handle)
    return os.open(path, os.O_RDONLY)


def read_for(path: Path, threads: int, seconds: float, seed: int) -> float:
    """Reads a second that this process reaches with so many threads, each with one read under way."""
    pages = path.stat().st_size // PAGE
    handle = _open(path)
    counts = [0] * threads
    begin = time.perf_counter()
    end = begin + seconds

    def work(place: int) -> None:
        draw = random.Random(f"{seed} {place}").random
        page = mmap.mmap(-1, PAGE)  # direct reads want memory on a page boundary
        target, read, clock, done = [page], os.preadv, time.perf_counter, 0
        while clock() < end:
            read(handle, target, int(draw() * pages) * PAGE)
            done += 1
        counts[place] = done

    running = [threading.Thread(target=work, args=(place,)) for place in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    spent = time.perf_counter() - begin
    os.close(handle)
    return sum(counts) / spent


if __name__ == "__main__":
    file, depth, length, number = sys.argv[1:]
    sys.stdout.write(f"{read_for(Path(file), int(depth), float(length), int(number))}\n")
