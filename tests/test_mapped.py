"""Rows of table files: the right ones in every way of reading, asked for once, within a bound on memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ways import EVERY_ROW, ROWS, WAYS, WIDTH, open_or_skip, table_file
from widths import fitting

from engram.kernels.codecs import CODECS
from engram.quantize import page_reader
from engram.quantize.mapped import MappedTable
from engram.quantize.row_store import Geometry, RowStoreError
from engram.quantize.row_table import Budget


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("verify", ["first-touch", "open", "off"])
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_gather_gives_the_rows_asked_for(tmp_path: Path, codec: str, verify: str, io: str) -> None:
    width = fitting(codec, 96 if CODECS[codec].group == 32 else WIDTH)
    path, expected = table_file(tmp_path, codec, width=width)
    rows = np.random.default_rng(0).integers(0, ROWS, 3000)
    rows[:4] = [0, ROWS - 1, ROWS - 1, 0]
    poisoned = np.full((len(rows), expected.shape[1]), 0xAA, dtype=np.uint8)
    with open_or_skip(path, io, verify) as table:
        assert table.io == io and table.codec == CODECS[codec]
        assert table.gather(rows, out=poisoned) is poisoned
        assert np.array_equal(poisoned, expected[rows])
        assert np.array_equal(table.gather(EVERY_ROW), expected)
        assert table.gather(rows[:0]).shape == (0, expected.shape[1])


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("threads", [1, 0])
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_decode_gives_what_the_codec_gives(tmp_path: Path, codec: str, threads: int, io: str) -> None:
    width = fitting(codec, 96 if CODECS[codec].group == 32 else WIDTH)
    path, encoded = table_file(tmp_path, codec, width=width)
    rows = np.random.default_rng(0).integers(0, ROWS, (25, 100))
    expected = CODECS[codec].decode(encoded[rows.ravel()], width)
    rounded = np.empty(expected.shape, dtype=np.uint16)
    CODECS[codec].decode(encoded[rows.ravel()], width, out=rounded)
    with open_or_skip(path, io) as table:
        out = np.full((25, 100 * width), np.nan, dtype=np.float32)
        assert table.decode(rows, out, threads=threads) is out
        assert np.array_equal(out.view(np.uint32).ravel(), expected.view(np.uint32).ravel())
        half = np.full((2500, width), 0xFFFF, dtype=np.uint16)
        ticket = table.ask(rows)
        for _ in range(2):  # a ticket may be taken from twice
            half[...] = 0xFFFF
            assert np.array_equal(table.take(ticket, half, threads=threads), rounded)


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize(("codec", "width"), [("int8-row", 5), ("int8-row", 4092), ("bf16", 3), ("f32", 1024)])
def test_rows_of_odd_sizes(tmp_path: Path, codec: str, width: int, io: str) -> None:
    path, expected = table_file(tmp_path, codec, 40, width)
    with open_or_skip(path, io) as table:
        assert np.array_equal(table.gather(np.arange(40)[::-1]), expected[::-1])


def test_blocks_read_the_whole_table_in_order(tmp_path: Path) -> None:
    path, expected = table_file(tmp_path, "f32", 4000, 72)
    with MappedTable.open(path) as table:
        firsts, blocks = zip(*table.blocks(), strict=True)
    assert len(blocks) > 1 and list(firsts) == np.cumsum([0, *map(len, blocks[:-1])]).tolist()
    assert np.array_equal(np.concatenate(blocks), expected)


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("row", [-1, ROWS, 2**62, -(2**63)])
def test_a_row_outside_the_table_is_refused(tmp_path: Path, row: int, io: str) -> None:
    path, expected = table_file(tmp_path)
    with open_or_skip(path, io) as table:
        with pytest.raises(RowStoreError, match=f"row {row} is outside the table of layer 3 .* has 5000 rows"):
            table.gather(np.array([0, row, 1]))
        assert table.pages_read == 0  # nothing was asked for on behalf of the good ones
        assert np.array_equal(table.gather(np.array([0, 1])), expected[:2])


@pytest.mark.parametrize("io", WAYS)
def test_an_output_that_does_not_fit_is_refused(tmp_path: Path, io: str) -> None:
    path, _ = table_file(tmp_path)
    rows = np.arange(10)
    outs: list[Any] = [
        np.empty((9, WIDTH), np.float32), np.empty((10, WIDTH), np.float64), np.empty((10, 2 * WIDTH), np.float32)
    ]  # fmt: skip
    readonly = np.empty((10, WIDTH), np.float32)
    readonly.flags.writeable = False
    with open_or_skip(path, io) as table:
        for out in (*outs, outs[2][:, ::2], readonly):
            with pytest.raises(RowStoreError, match="cannot be handed over"):
                table.decode(rows, out)


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"codec": "nf4"}, "has codec 'int8-row', expected 'nf4'"),
        ({"rows": 4999}, "has rows 5000, expected 4999"),
        ({"width": 64}, "has width 72, expected 64"),
        ({"layer": 15}, "has layer 3, expected 15"),
    ],
)
def test_another_table_than_expected_is_refused(tmp_path: Path, expected: dict[str, Any], words: str) -> None:
    path, _ = table_file(tmp_path)
    with pytest.raises(RowStoreError, match=words):
        MappedTable.open(path, **expected)


def test_the_way_is_chosen_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = table_file(tmp_path)
    with MappedTable.open(path) as table:
        assert table.io == WAYS[0] and table.why
    with pytest.raises(RowStoreError, match="io 'fast' is not known"):
        MappedTable.open(path, io="fast")
    monkeypatch.setattr(page_reader, "_kernels", lambda: None)
    with MappedTable.open(path) as table:
        assert (table.io, table.why) == ("numpy", "the C++ kernels are not built")
    with pytest.raises(RowStoreError, match="io 'uring' needs the C\\+\\+ kernels"):
        MappedTable.open(path, io="uring")


@pytest.mark.skipif(len(WAYS) == 1, reason="the C++ kernels are not built")
def test_files_that_cannot_be_mapped_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected = table_file(tmp_path)
    kernels = page_reader._kernels()

    class Unmapped:
        def open_pages(self, way: str, *arguments: Any) -> Any:
            if way == "mmap":
                raise RuntimeError("mmap: No such device")
            return kernels.open_pages(way, *arguments)

    monkeypatch.setattr(page_reader, "_kernels", Unmapped)
    with MappedTable.open(path) as table:
        assert (table.io, table.why) == ("pread", "the files cannot be mapped: mmap: No such device")
        assert np.array_equal(table.gather(EVERY_ROW), expected)
    with pytest.raises(RowStoreError, match="io 'mmap' cannot be used here: mmap: No such device"):
        MappedTable.open(path, io="mmap")


@pytest.mark.skipif(len(WAYS) == 1, reason="the C++ kernels are not built")
def test_a_way_that_cannot_be_gone_is_refused(tmp_path: Path) -> None:
    path, _ = table_file(tmp_path)
    handle = os.open(path, os.O_RDONLY)
    os.close(handle)
    places = page_reader.Places([page_reader.File(handle, 1)], [], [], 0, page_reader.Sums(0, 0, 0))
    for io in WAYS[:-1]:
        with pytest.raises(RowStoreError, match=f"io '{io}' cannot be used here: dup: Bad file descriptor"):
            page_reader.open_reader(places, CODECS["f32"], verify=True, io=io)


def test_pages_are_asked_for_once(tmp_path: Path) -> None:
    path, _ = table_file(tmp_path)  # 53 rows a page
    for io in {WAYS[0], "numpy"}:
        with MappedTable.open(path, io=io) as table:
            counts = []
            for pages in ([3, 4, 5, 9, 3], [4, 9, 10], [3, 10]):
                table.gather(np.array(pages) * 53)
                counts.append(table.pages_read)
            table.trim()
            table.gather(np.array([3 * 53]))
            assert counts == [4, 5, 5] and table.pages_read == 6


@pytest.mark.parametrize("io", WAYS)
def test_threads_share_a_table(tmp_path: Path, io: str) -> None:
    path, expected = table_file(tmp_path)
    wrong = []
    with open_or_skip(path, io) as table:

        def work(seed: int) -> None:
            for i in range(20):
                rows = np.random.default_rng((seed, i)).integers(0, ROWS, 200)
                if not np.array_equal(table.gather(rows), expected[rows]):
                    wrong.append((seed, i))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("io", WAYS)
def test_a_closed_table_closes_its_file(tmp_path: Path, io: str) -> None:
    path, expected = table_file(tmp_path)
    open_or_skip(path, io).close()
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    table = open_or_skip(path, io)
    table.gather(EVERY_ROW)
    table.ask(EVERY_ROW)
    table.close()
    table.close()
    assert (os.listdir("/proc/self/fd") if before else []) == before
    with pytest.raises(RowStoreError, match=f"{path} \\(layer 3\\) is closed"):
        table.gather(EVERY_ROW)


@pytest.mark.parametrize("io", WAYS)
def test_a_child_of_fork_reads_too(tmp_path: Path, io: str) -> None:
    path, _ = table_file(tmp_path)
    open_or_skip(path, io).close()
    code = f"""
import os, sys
import numpy as np
from pathlib import Path
from engram.quantize.mapped import MappedTable
table = MappedTable.open(Path(sys.argv[1]), io={io!r})
rows = np.arange({ROWS})
table.gather(rows[:60])
ticket = table.ask(rows)
child = os.fork()
out = np.empty(({ROWS}, {WIDTH}), np.float32)
table.take(ticket, out)
other = table.decode(rows, np.empty_like(out))
assert np.array_equal(out, other)
if child:
    assert os.waitpid(child, 0)[1] == 0
    print("both")
"""
    if io == "numpy":
        # Its thread does not survive a fork: the child must ask first.
        lines = "ticket = table.ask(rows)\n", "child = os.fork()\n"
        code = code.replace("table.gather(rows[:60])\n", "").replace("".join(lines), "".join(lines[::-1]))
    child = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stdout) == (0, "both\n"), child.stderr


@pytest.mark.parametrize("io", WAYS)
def test_a_budget_changes_memory_not_rows(tmp_path: Path, io: str) -> None:
    path, expected = table_file(tmp_path, "f32", 40_000, 72)
    rows = np.random.default_rng(0).integers(0, 40_000, 3000)
    with open_or_skip(path, io) as table:
        budget = Budget(limit_bytes=1 << 20)
        budget.adopt(table)
        assert np.array_equal(table.gather(rows), expected[rows])
        assert np.array_equal(table.gather(np.sort(rows)), expected[np.sort(rows)])
        out = np.full((3000, 72), np.nan, dtype=np.float32)
        assert np.array_equal(table.decode(rows, out).view(np.uint8).reshape(expected[rows].shape), expected[rows])
        assert budget.trims > 0 or io in ("uring", "pread")


@pytest.mark.parametrize("io", ["mmap", "numpy"])
def test_pieces_cover_a_ticket_and_map_few_folios(tmp_path: Path, io: str) -> None:
    if io not in WAYS:
        pytest.skip("the C++ kernels are not built")
    path, _ = table_file(tmp_path, "f32", 20_000, 1024)  # one row a page
    rows = np.random.default_rng(0).integers(0, 20_000, 3000)
    with open_or_skip(path, io) as table:
        for these in (rows, np.sort(rows)):
            edges = table._reader.pieces(table.ask(these), 4)
            assert edges[0] == 0 and edges[-1] == len(rows) and edges == sorted(set(edges))
            # Where a stretch begins depends on where the file was mapped: one place of 512 must explain all pieces.
            inside = np.ones(len(these), dtype=bool)
            inside[edges[:-1]] = False
            assert any(
                np.add.reduceat(inside & np.r_[False, np.diff((these + first) // 512) != 0], edges[:-1]).max() < 4
                for first in range(512)
            )
            assert len(edges) - 1 >= (10 if these is not rows else 500)
        assert table._reader.pieces(table.ask(rows[:0]), 4)[0] == 0


@pytest.mark.parametrize("io", WAYS)
def test_memory_stays_within_a_budget_far_smaller_than_the_table(tmp_path: Path, io: str) -> None:
    """256 MiB of rows, 12 MiB of memory for them: the resident pages of files never grow by more."""
    path = tmp_path / "layer-03.safetensors"
    code = f"""
import sys
import numpy as np
from pathlib import Path
from engram.kernels.codecs import CODECS
from engram.quantize.mapped import MappedTable
from engram.quantize.row_store import RowStoreError, write_table
from engram.quantize.row_table import Budget
path, rows = Path(sys.argv[1]), 1 << 18
blocks = (np.arange(i, i + 4096, dtype=np.float32)[:, None].repeat(256, 1) for i in range(0, rows, 4096))
write_table(path, blocks, rows=rows, width=256, codec=CODECS["f32"], layer=3)
def now():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {{name: int(fields[name].split()[0]) << 10 for name in ("RssFile", "RssAnon")}}
try:
    table = MappedTable.open(path, io={io!r})
except RowStoreError as error:
    print("skip", error)
    sys.exit()
out = np.ones((4096, 256), np.float32)
table.decode(np.arange(40), out[:40])
table.gather(np.arange(40))
Budget(12 << 20).adopt(table)
begin, most = now(), {{"RssFile": 0, "RssAnon": 0}}
for i in range(12):
    wanted = np.random.default_rng(i).integers(0, rows, 4096)
    table.decode(wanted, out)
    assert np.array_equal(out[:, 0], wanted) and np.array_equal(out[:, 255], wanted)
    most = {{name: max(most[name], value - begin[name]) for name, value in now().items()}}
print(most["RssFile"], most["RssAnon"], flush=True)
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the system does not tell what is resident")
    child = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    if child.stdout.startswith("skip"):
        pytest.skip(child.stdout)
    files, memory = map(int, child.stdout.split())
    assert files <= 12 << 20 and memory <= 12 << 20, (files, memory)


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("width", [3, 72, 1024])
def test_rows_beyond_32_bits(tmp_path: Path, width: int, io: str) -> None:
    """A sparse table of hundreds of gigabytes, a few rows of it written where the specification says they lie."""
    codec = CODECS["int8-row"] if width == 72 else CODECS["f32"]
    each = 4096 // codec.row_bytes(width)
    count = each * (1 << 27) + 1  # half a terabyte of pages
    geometry = Geometry(codec, count, width, 0)
    wanted = np.random.default_rng(0).integers(0, count, 300)
    wanted[:3] = [count - 1, count - 2, 0]
    encoded = np.random.default_rng(1).integers(0, 256, (300, geometry.row_bytes), dtype=np.uint8)
    path = tmp_path / "table"
    try:
        with path.open("wb") as file:
            file.write(geometry.header)
            for row, content in zip(wanted.tolist(), encoded, strict=True):
                file.seek(len(geometry.header) + row // each * 4096 + row % each * geometry.row_bytes)
                file.write(content.tobytes())
            file.seek(geometry.file_bytes - 4)
            file.write(zlib.crc32(geometry.header).to_bytes(4, "little"))
    except OSError as error:
        pytest.skip(f"no sparse files here: {error}")
    with open_or_skip(path, io, "off") as table:
        assert table.rows > 1 << 32 or width == 1024
        assert np.array_equal(table.gather(wanted), encoded)
    path.unlink()
