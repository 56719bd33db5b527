"""Every way in which a table file is damaged, moved, cut short or replaced: a named error or the right rows, in every
way of reading, and the process lives."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ways import BUILT, EVERY_ROW, ROWS, WAYS, WIDTH, flip, open_or_skip, table_file

from engram.kernels.codecs import CODECS
from engram.quantize.mapped import MappedTable
from engram.quantize.row_store import RowStoreError, write_table
from engram.quantize.row_table import Budget

# 76 bytes a row, 53 rows a page: page 7 holds rows 371 to 423. 95 pages behind a header of one.
PAGE_7, SUMS = 4096 + 7 * 4096, 4096 + 95 * 4096
WHOLE = SUMS + 4 * 96
NAMED = r"\(layer 3\) is damaged: page 7, rows 371 to 423, does not match its checksum"


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("offset", [0, 76 * 53 - 1, 76 * 53, 4095], ids=["value", "last scale", "padding", "end"])
def test_a_flipped_bit_is_named_at_first_touch(tmp_path: Path, offset: int, io: str) -> None:
    path, expected = table_file(tmp_path)
    flip(path, PAGE_7 + offset, bit=5)
    with open_or_skip(path, io) as table:
        others = EVERY_ROW[EVERY_ROW // 53 != 7]
        assert np.array_equal(table.gather(others), expected[others])
        for _ in range(2):
            with pytest.raises(RowStoreError, match=NAMED) as caught:
                table.gather(np.array([0, 400]))
        with pytest.raises(RowStoreError, match=NAMED):
            table.decode(np.array([0, 400]), np.full((2, WIDTH), np.nan, np.float32))
        assert str(path) in str(caught.value)
        assert np.array_equal(table.gather(others), expected[others])


@pytest.mark.parametrize("io", WAYS)
def test_every_page_is_watched(tmp_path: Path, io: str) -> None:
    path, expected = table_file(tmp_path)
    with open_or_skip(path, io) as table:
        pass
    for page in range(95):
        flip(path, 4096 + page * 4096 + 17 * page % 4096)
        begin, end = 53 * page, min(53 * page + 53, ROWS)
        with open_or_skip(path, io) as table:
            with pytest.raises(RowStoreError, match=f"page {page}, rows {begin} to {end - 1},"):
                table.gather(EVERY_ROW)
        flip(path, 4096 + page * 4096 + 17 * page % 4096)
    with open_or_skip(path, io) as table:
        assert np.array_equal(table.gather(EVERY_ROW), expected)


@pytest.mark.parametrize("io", WAYS)
def test_a_flipped_bit_in_the_checksums_is_found(tmp_path: Path, io: str) -> None:
    path, _ = table_file(tmp_path)
    flip(path, SUMS + 4 * 7)
    with open_or_skip(path, io) as table, pytest.raises(RowStoreError, match=NAMED):
        table.gather(EVERY_ROW)


@pytest.mark.parametrize("position", [*range(8), 8, 60, 1000, 4095, WHOLE - 1])
def test_a_flipped_bit_in_the_header_or_its_checksum_is_refused(tmp_path: Path, position: int) -> None:
    path, _ = table_file(tmp_path)
    flip(path, position, bit=2)
    with pytest.raises(RowStoreError, match=re.escape(str(path))):
        MappedTable.open(path)


@pytest.mark.parametrize("io", WAYS)
def test_a_flipped_bit_is_found_at_open_when_asked(tmp_path: Path, io: str) -> None:
    path, _ = table_file(tmp_path)
    open_or_skip(path, io).close()
    flip(path, PAGE_7)
    with pytest.raises(RowStoreError, match=NAMED):
        MappedTable.open(path, verify="open", io=io)
    MappedTable.open(path, verify="off", io=io).close()


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("verify", ["first-touch", "open"])
def test_damage_after_the_first_touch_is_found(tmp_path: Path, verify: str, io: str) -> None:
    path, expected = table_file(tmp_path)
    with open_or_skip(path, io, verify) as table:
        table.gather(EVERY_ROW)
        ticket = table.ask(EVERY_ROW)
        flip(path, PAGE_7)
        with pytest.raises(RowStoreError, match=NAMED):
            table.gather(EVERY_ROW)
        if io in ("mmap", "numpy"):  # the others read the page when they were asked, or not: both are right
            with pytest.raises(RowStoreError, match=NAMED):
                table.take(ticket, np.full((ROWS, WIDTH), np.nan, np.float32))
        flip(path, PAGE_7)  # whole again
        assert np.array_equal(table.gather(EVERY_ROW), expected)
        times = os.stat(path)
        flip(path, PAGE_7)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had been written
        with pytest.raises(RowStoreError, match=NAMED):
            table.gather(EVERY_ROW)


@pytest.mark.parametrize("io", WAYS)
def test_a_hole_is_found(tmp_path: Path, io: str) -> None:
    path, _ = table_file(tmp_path)
    content = path.read_bytes()
    with path.open("wb") as file:  # page 7 was never written: it reads as zeros
        file.write(content[:PAGE_7])
        file.seek(PAGE_7 + 4096)
        file.write(content[PAGE_7 + 4096 :])
    with open_or_skip(path, io) as table, pytest.raises(RowStoreError, match=NAMED):
        table.gather(EVERY_ROW)


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RowStoreError, match="cannot be opened: No such file"):
        MappedTable.open(tmp_path / "none")
    with pytest.raises(RowStoreError, match="cannot be read: Is a directory|has .* bytes"):
        MappedTable.open(tmp_path)
    path, _ = table_file(tmp_path)
    with pytest.raises(RowStoreError, match="verify 'never' is not known"):
        MappedTable.open(path, verify="never")

    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)  # root may open everything
    with pytest.raises(RowStoreError, match=f"{path} cannot be opened: Permission denied"):
        MappedTable.open(path)


@pytest.mark.parametrize("size", [0, 7, 4096, 300_000, WHOLE - 1])
def test_a_file_truncated_before_it_is_opened_is_refused(tmp_path: Path, size: int) -> None:
    path, _ = table_file(tmp_path)
    os.truncate(path, size)
    with pytest.raises(RowStoreError, match=re.escape(str(path))):
        MappedTable.open(path)


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("size", [0, 8192, 300_000, WHOLE - 1, WHOLE + 1, WHOLE + 5000])
@pytest.mark.parametrize("verify", ["first-touch", "off"])
def test_a_file_of_another_size_while_open_is_refused(tmp_path: Path, size: int, verify: str, io: str) -> None:
    path, _ = table_file(tmp_path)
    with open_or_skip(path, io, verify) as table:
        table.gather(np.arange(100))
        os.truncate(path, size)
        for _ in range(2):
            with pytest.raises(RowStoreError, match=f"{path} \\(layer 3\\) has {size} bytes, it had {WHOLE} when"):
                table.gather(EVERY_ROW)


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("budget", [False, True])
def test_a_file_truncated_between_ask_and_take_is_refused(tmp_path: Path, budget: bool, io: str) -> None:
    path, _ = table_file(tmp_path)
    with open_or_skip(path, io) as table:
        if budget:
            Budget(1 << 20).adopt(table)
        ticket = table.ask(EVERY_ROW)
        os.truncate(path, 8192)
        with pytest.raises(RowStoreError, match="has 8192 bytes, it had"):
            table.take(ticket, np.full((ROWS, WIDTH), np.nan, np.float32))


STRESS = """
import os, sys, time
import numpy as np
from pathlib import Path
from engram.kernels.codecs import CODECS
from engram.quantize.mapped import MappedTable
from engram.quantize.row_store import RowStoreError
from engram.quantize.row_table import Budget
path, io, verify = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
expected = np.load(sys.argv[4])
table = MappedTable.open(path, io=io)
content = path.read_bytes()
child = os.fork()
if not child:  # cuts the file short and restores it, over and over
    rng = np.random.default_rng(0)
    for _ in range(100_000):
        cut = int(rng.integers(0, len(content)))
        os.truncate(path, cut)
        time.sleep(0.0005)
        with open(path, "r+b") as file:
            file.seek(cut)
            file.write(content[cut:])
        time.sleep(0.0005)
    os._exit(0)
right = wrong = refused = 0
end = time.monotonic() + 3
try:
    while time.monotonic() < end:
        rows = np.random.default_rng(right + refused).integers(0, len(expected), 3000)
        out = np.full((3000, expected.shape[1]), 0xAA, np.uint8)
        try:
            table.gather(rows, out, threads=0)
        except RowStoreError:
            refused += 1
        else:
            same = np.array_equal(out, expected[rows])
            right, wrong = right + same, wrong + (not same)
finally:
    os.kill(child, 9)
    os.waitpid(child, 0)
print(right, wrong, refused)
"""


@pytest.mark.parametrize("io", [way for way in WAYS if way != "numpy"])  # its gap is documented
def test_truncated_and_restored_while_rows_are_copied(tmp_path: Path, io: str) -> None:
    path, expected = table_file(tmp_path)
    open_or_skip(path, io).close()
    np.save(tmp_path / "expected.npy", expected)
    child = subprocess.run(
        [sys.executable, "-c", STRESS, str(path), io, "first-touch", str(tmp_path / "expected.npy")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert child.returncode == 0, (child.returncode, child.stderr)
    right, wrong, refused = map(int, child.stdout.split())
    assert wrong == 0 and refused > 0, (right, wrong, refused)


@pytest.mark.skipif(not BUILT, reason="the C++ kernels are not built")
@pytest.mark.parametrize("handler", ["none", "faulthandler"])
def test_a_fault_of_somebody_else_still_ends_the_process(tmp_path: Path, handler: str) -> None:
    """Our handler stands aside: the default, or a handler that was there before, acts as if it were not there."""
    path, _ = table_file(tmp_path)
    for order in ("before", "after"):
        code = f"""
import ctypes, faulthandler, mmap, os, resource, sys
import numpy as np
from pathlib import Path
from engram.quantize.mapped import MappedTable
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
{"faulthandler.enable()" if (handler, order) == ("faulthandler", "before") else ""}
table = MappedTable.open(Path(sys.argv[1]), io="mmap")
table.gather(np.arange(10))
{"faulthandler.enable()" if (handler, order) == ("faulthandler", "after") else ""}
table.gather(np.arange(1000))
with open(sys.argv[1] + ".other", "w+b") as file:
    file.truncate(4096)
    mapped = mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_READ)
    file.truncate(0)
    mapped[0]
"""
        child = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
        assert child.returncode == -signal.SIGBUS
        assert ("Fatal Python error: Bus error" in child.stderr) == (handler == "faulthandler")
        assert child.stderr.count("Fatal Python error") <= 2


@pytest.mark.parametrize("io", WAYS)
def test_a_replaced_file_keeps_serving_its_old_rows(tmp_path: Path, io: str) -> None:
    path, expected = table_file(tmp_path)
    with open_or_skip(path, io) as table:
        values = np.zeros((ROWS + 1, WIDTH), dtype=np.float32)
        write_table(path, [values], rows=ROWS + 1, width=WIDTH, codec=CODECS["int8-row"], layer=3)
        assert np.array_equal(table.gather(EVERY_ROW), expected)
    with pytest.raises(RowStoreError, match="has rows 5001, expected 5000"):
        MappedTable.open(path, rows=ROWS)


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("fate", ["moved", "deleted", "unreadable"])
def test_a_file_that_is_gone_keeps_serving_its_rows(tmp_path: Path, fate: str, io: str) -> None:
    path, expected = table_file(tmp_path)
    with open_or_skip(path, io) as table:
        table.gather(np.arange(100))
        if fate == "moved":
            shutil.move(path, tmp_path / "elsewhere")
        elif fate == "deleted":
            path.unlink()
        else:
            path.chmod(0)
        assert np.array_equal(table.gather(EVERY_ROW), expected)


@pytest.mark.parametrize("io", WAYS)
def test_a_file_overwritten_in_place_is_refused(tmp_path: Path, io: str) -> None:
    path, expected = table_file(tmp_path)
    before = path.read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    values = np.random.default_rng(6).standard_normal((ROWS, WIDTH)).astype(np.float32)
    write_table(other / "table", [values], rows=ROWS, width=WIDTH, codec=CODECS["int8-row"], layer=3)
    with open_or_skip(path, io) as table:
        table.gather(EVERY_ROW)
        content = (other / "table").read_bytes()
        with path.open("r+b") as file:  # the pages of another table, the checksums of this one
            file.write(content[:SUMS])
        with pytest.raises(RowStoreError, match="is damaged: page 0, rows 0 to 52,"):
            table.gather(EVERY_ROW)
        with path.open("r+b") as file:  # another table in whole, with checksums that hold
            file.write(content)
        for _ in range(2):
            with pytest.raises(RowStoreError, match=f"{path} \\(layer 3\\) was overwritten while in use"):
                table.gather(EVERY_ROW)
        with path.open("r+b") as file:
            file.write(before)
        assert np.array_equal(table.gather(EVERY_ROW), expected)


@pytest.mark.parametrize("io", WAYS)
def test_a_file_that_is_only_touched_goes_on(tmp_path: Path, io: str) -> None:
    path, expected = table_file(tmp_path)
    with open_or_skip(path, io) as table:
        ticket = table.ask(EVERY_ROW)
        path.touch()
        assert np.array_equal(table.gather(EVERY_ROW), expected)
        out = np.full((ROWS, WIDTH), np.nan, np.float32)
        assert np.array_equal(table.take(ticket, out), CODECS["int8-row"].decode(expected, WIDTH))
