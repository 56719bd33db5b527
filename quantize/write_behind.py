"""Pages that are hashed, checksummed and written while the next ones are made: two threads, a few blocks of memory."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from engram.kernels import dispatch
from engram.kernels.codecs import Bytes

PAGE = 4096
BLOCK_PAGES = 512  # 2 MiB are packed, checksummed and written at a time
_BLOCKS = 6
_BEHIND_BYTES = 64 << 20  # written pages of this stretch may still be in the page cache


class PageSink:
    """Pages of one file, in order: SHA-256 in one thread, CRC-32 and writing in another.

    Fill what `take` gives, hand it to `put`, take the next. An error of a thread is raised by the next call.
    """

    def __init__(self, handle: int, begin: int, sums_begin: int) -> None:
        self._handle, self._begin, self._sums_begin = handle, begin, sums_begin
        self.sha256 = hashlib.sha256()
        self._free = [np.zeros((BLOCK_PAGES, PAGE), dtype=np.uint8) for _ in range(_BLOCKS)]
        self._busy: deque[tuple[Bytes, list[Future[Any]]]] = deque()
        self._hashing, self._writing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def take(self) -> Bytes:
        """A block [512, 4096] to fill; its pages hold what they held when it was put."""
        if not self._free:
            self._wait()
        return self._free.pop()

    def put(self, block: Bytes, count: int, first_page: int, *, final: bool = True) -> None:
        """Write the block's first `count` pages as those from `first_page` on, and hash them.

        The block belongs to the sink from now on. But where the pages are not `final` (they will be put again), they
        are not hashed, and when the call returns they are written and the block is the caller's.
        """
        pages = block[:count]
        writing = self._writing.submit(self._write, pages, first_page)
        if final:
            self._busy.append((block, [writing, self._hashing.submit(self.sha256.update, pages.data)]))
        else:
            writing.result()

    def _write(self, pages: Bytes, first_page: int) -> None:
        sums = dispatch.ops().crc32_pages(pages).astype("<u4")
        offset = self._begin + first_page * PAGE
        write_at(self._handle, pages.data, offset)
        write_at(self._handle, sums.data, self._sums_begin + first_page * 4)
        start = max(0, offset - _BEHIND_BYTES)
        forget(self._handle, start, offset + pages.nbytes - start)

    def _wait(self) -> None:
        block, futures = self._busy.popleft()
        for future in futures:
            future.result()
        self._free.append(block)

    def drain(self) -> None:
        """Wait until everything that was put is written and hashed."""
        while self._busy:
            self._wait()

    def close(self) -> None:
        """End the threads; what was put and has not begun is dropped."""
        for pool in (self._writing, self._hashing):
            pool.shutdown(cancel_futures=True)


def write_at(handle: int, data: memoryview | bytes, offset: int) -> None:
    """All of the data, from this place of the file on."""
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(handle, view, offset)
        view, offset = view[done:], offset + done


def forget(handle: int, offset: int, length: int) -> None:
    """Have the kernel begin to write what is dirty there, and drop what is clean: others need the page cache more."""
    if length > 0 and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, offset, length, os.POSIX_FADV_DONTNEED)
