"""Makes an extent map: the foreign files are read once, at the disk's speed, for the checksums of their blocks."""

from __future__ import annotations

import errno
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import EngramError, Progress
from engram.builders.atomic import sync_path
from engram.kernels import dispatch
from engram.kernels.codecs import Bytes, Codec
from engram.quantize.extents import Extent, ExtentMap, Source
from engram.quantize.page_reader import Run
from engram.quantize.row_store import PAGE, RowStoreError
from engram.quantize.stream import AHEAD, read_ahead
from engram.quantize.write_behind import forget

_STREAM_BLOCKS = 1024  # read at a time
_ZEROS = zlib.crc32(bytes(PAGE))
Noted = dict[str, int]


def map_extents(
    out: Path,
    parts: Sequence[Sequence[Source]],
    codec: Codec,
    *,
    rows: int,
    width: int,
    layer: int,
    progress: Progress | None = None,
    resume: Noted | None = None,
    after: Callable[[Callable[[], Noted]], Any] | None = None,
) -> dict[str, Any]:
    """Write an extent map over rows that lie in other files; those are read once for their checksums, never written.

    `parts` has, for each part of a row, the sources that hold its rows one after another. Paths inside the map's folder
    are recorded relative to it, others in full. Returns {"files", "extents", "blocks", "bytes"}. Raises RowStoreError
    for sources that do not make the table, or end before their last row.

    To go on after a kill: `after` is called now and then with a function that has all checksums so far on the disk and
    returns what to note of them; a later call with that as `resume` begins behind them, if they are still there. With
    `after`, an error that is no EngramError leaves the unfinished map for that.
    """
    extent_map, paths = _plan(out, parts, codec, rows, width, layer)
    partial = out.with_name(out.name + ".partial")
    head = extent_map.head
    keep = False
    try:
        with partial.open("r+b" if resume and partial.exists() else "w+b") as target:
            done, sums = _take_over(target, head, resume, extent_map.blocks)
            begin, first = time.monotonic(), done

            def synced() -> Noted:
                target.flush()
                os.fsync(target.fileno())
                return {"blocks": done, "crc32": sums}

            with (progress or Progress()).task(f"checksums of layer {layer}", extent_map.blocks, "blocks") as task:
                task.advance(done)
                for found in _checksums(extent_map.runs, paths, done):
                    data = found.astype("<u4").tobytes()
                    target.write(data)
                    done, sums = done + len(found), zlib.crc32(data, sums)
                    task.advance(len(found))
                    task.note(f"{(done - first) * PAGE / max(time.monotonic() - begin, 1e-9) / 1e6:,.0f} MB/s")
                    if after is not None:
                        after(synced)
            target.write(zlib.crc32(head).to_bytes(4, "little"))
            synced()
        partial.rename(out)
        sync_path(out.parent)
    except BaseException as failure:
        keep = after is not None and not isinstance(failure, EngramError)
        raise
    finally:
        if not keep:
            partial.unlink(missing_ok=True)
    extents = len(extent_map.extents)
    return {"files": len(paths), "extents": extents, "blocks": extent_map.blocks, "bytes": out.stat().st_size}


def _plan(
    out: Path, parts: Sequence[Sequence[Source]], codec: Codec, rows: int, width: int, layer: int
) -> tuple[ExtentMap, list[Path]]:
    """Everything but the checksums, and the files."""
    paths = list(dict.fromkeys(source.path.resolve() for part in parts for source in part))
    extents = []
    for number, part in enumerate(parts):
        first = 0
        for source in part:
            if source.bytes != part[0].bytes:
                raise RowStoreError(
                    f"{source.path} has rows of {source.bytes} bytes, {part[0].path} of {part[0].bytes}"
                )
            extents.append(
                Extent(number, paths.index(source.path.resolve()), first, source.rows, source.offset, source.stride)
            )
            first += source.rows
    folder = out.parent.resolve()
    try:
        files = [(_recorded(path, folder), path.stat().st_size) for path in paths]
    except OSError as wrong:
        raise RowStoreError(f"{wrong.filename} cannot be read: {wrong.strerror}") from None
    return ExtentMap(codec, rows, width, layer, [part[0].bytes for part in parts if part], files, extents), paths


def _take_over(target: Any, head: bytes, resume: Noted | None, blocks: int) -> tuple[int, int]:
    """Blocks whose checksums an earlier run left and the CRC-32 of those; the file is ready to write the next one."""
    if resume and resume["blocks"] <= blocks and target.read(len(head)) == head:
        data = target.read(4 * resume["blocks"])
        if len(data) == 4 * resume["blocks"] and zlib.crc32(data) == resume["crc32"]:
            target.seek(len(head) + len(data))
            target.truncate()
            return resume["blocks"], resume["crc32"]
    target.seek(0)
    target.truncate()
    target.write(head)
    return 0, 0


def _checksums(runs: Sequence[Run], paths: Sequence[Path], first: int) -> Iterator[NDArray[np.uint32]]:
    """CRC-32 of the blocks from number `first` on, uint32 [at most 1024] at a time, read ahead."""
    ring = [np.empty((_STREAM_BLOCKS, PAGE), dtype=np.uint8) for _ in range(AHEAD)]
    for run in runs:
        starts = range(max(0, first - run.first_sum), run.blocks, _STREAM_BLOCKS)
        if not len(starts):
            continue
        path = paths[run.file]
        with path.open("rb", buffering=0) as file:

            def read(start: int, buffer: Bytes, file: Any = file, run: Run = run, path: Path = path) -> Bytes | None:
                return _read_blocks(file.fileno(), run, start, buffer, path)

            for start, data in zip(starts, read_ahead(starts, ring, read), strict=True):
                yield _sums_of(data) if data is not None else np.full(
                    min(_STREAM_BLOCKS, run.blocks - start), _ZEROS, dtype=np.uint32
                )


def _read_blocks(handle: int, run: Run, start: int, buffer: Bytes, path: Path) -> Bytes | None:
    """Bytes of up to 1024 blocks of a run, None where they are a hole; the last block of a file may be shorter."""
    count = min(len(buffer), run.blocks - start)
    view = buffer.reshape(-1)[: count * PAGE]
    offset, got = (run.first_block + start) * PAGE, 0
    if _is_hole(handle, offset, len(view)):
        return None
    while got < len(view):
        done = os.preadv(handle, [view[got:].data], offset + got)
        if not done:
            break
        got += done
    if got <= (count - 1) * PAGE:
        raise RowStoreError(f"{path} became shorter while it was read")
    forget(handle, offset, got)
    return view[:got]


def _is_hole(handle: int, offset: int, size: int) -> bool:
    """Whether these bytes are all there, and a hole of a sparse file: zeros that need no reading."""
    if not hasattr(os, "SEEK_DATA") or os.fstat(handle).st_size < offset + size:
        return False
    try:
        return os.lseek(handle, offset, os.SEEK_DATA) >= offset + size
    except OSError as wrong:
        return wrong.errno == errno.ENXIO  # nothing but holes from here on


def _sums_of(data: Bytes) -> NDArray[np.uint32]:
    whole = len(data) // PAGE
    sums = dispatch.ops().crc32_pages(data[: whole * PAGE].reshape(whole, PAGE))
    rest = data[whole * PAGE :]
    return np.append(sums, np.uint32(zlib.crc32(rest.data))) if len(rest) else sums


def _recorded(path: Path, folder: Path) -> str:
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()
