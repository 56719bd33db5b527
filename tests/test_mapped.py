"""Rows through the map: the right rows, and a named error for every way in which a file is damaged or pulled away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from widths import fitting

from engram.kernels.codecs import CODECS, Bytes
from engram.quantize.mapped import Budget, MappedTable
from engram.quantize.row_store import RowStoreError, write_table

ROWS, WIDTH = 5000, 72
EVERY_ROW = np.arange(ROWS)


def table_file(folder: Path, codec: str = "int8-row", rows: int = ROWS, width: int = WIDTH) -> tuple[Path, Bytes]:
    """A table file, and its rows as the codec encodes them."""
    values = np.random.default_rng(5).standard_normal((rows, width)).astype(np.float32)
    path = folder / "layer-03.safetensors"
    write_table(path, [values], rows=rows, width=width, codec=CODECS[codec], layer=3)
    return path, CODECS[codec].encode(values)


def flip(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize("verify", ["first-touch", "open", "off"])
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_gather_gives_the_rows_asked_for(tmp_path: Path, codec: str, verify: str) -> None:
    width = fitting(codec, WIDTH)
    path, expected = table_file(tmp_path, codec, width=width)
    rows = np.random.default_rng(0).integers(0, ROWS, 3000)
    rows[:4] = [0, ROWS - 1, ROWS - 1, 0]
    poisoned = np.full((len(rows), expected.shape[1]), 0xAA, dtype=np.uint8)
    with MappedTable.open(path, codec=codec, rows=ROWS, width=width, layer=3, verify=verify) as table:
        assert table.gather(rows, out=poisoned) is poisoned
        assert np.array_equal(poisoned, expected[rows])
        assert np.array_equal(table.gather(EVERY_ROW), expected)
        assert table.gather(rows[:0]).shape == (0, expected.shape[1])


@pytest.mark.parametrize(("codec", "width"), [("int8-row", 5), ("int8-row", 4092), ("bf16", 3), ("f32", 1024)])
def test_rows_of_odd_sizes(tmp_path: Path, codec: str, width: int) -> None:
    path, expected = table_file(tmp_path, codec, 40, width)
    with MappedTable.open(path) as table:
        assert np.array_equal(table.gather(np.arange(40)[::-1]), expected[::-1])


def test_blocks_read_the_whole_table_in_order(tmp_path: Path) -> None:
    path, expected = table_file(tmp_path, "f32", 4000, 72)
    with MappedTable.open(path) as table:
        firsts, blocks = zip(*table.blocks(), strict=True)
    assert len(blocks) > 1 and list(firsts) == np.cumsum([0, *map(len, blocks[:-1])]).tolist()
    assert np.array_equal(np.concatenate(blocks), expected)


@pytest.mark.parametrize("row", [-1, ROWS, 2**62, -(2**63)])
def test_a_row_outside_the_table_is_refused(tmp_path: Path, row: int) -> None:
    path, _ = table_file(tmp_path)
    with MappedTable.open(path) as table:
        with pytest.raises(RowStoreError, match=f"row {row} is outside the table of layer 3 .* has 5000 rows"):
            table.gather(np.array([0, row, 1]))


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


def test_a_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RowStoreError, match="cannot be opened: No such file"):
        MappedTable.open(tmp_path / "none")
    with pytest.raises(RowStoreError, match="cannot be read: Is a directory|has .* bytes"):
        MappedTable.open(tmp_path)
    path, _ = table_file(tmp_path)
    with pytest.raises(RowStoreError, match="verify 'never' is not known"):
        MappedTable.open(path, verify="never")


@pytest.mark.parametrize("offset", [0, 76 * 53 - 1, 76 * 53, 4095], ids=["value", "last scale", "padding", "end"])
def test_a_flipped_bit_is_named_at_first_touch(tmp_path: Path, offset: int) -> None:
    path, expected = table_file(tmp_path)  # 53 rows a page: page 7 holds rows 371 to 423
    flip(path, 4096 + 7 * 4096 + offset, bit=5)
    with MappedTable.open(path) as table:
        others = EVERY_ROW[EVERY_ROW // 53 != 7]
        assert np.array_equal(table.gather(others), expected[others])
        for _ in range(2):
            with pytest.raises(RowStoreError, match=r"\(layer 3\) is damaged: page 7, rows 371 to 423,") as caught:
                table.gather(np.array([0, 400]))
        assert str(path) in str(caught.value)


def test_a_flipped_bit_on_the_last_page_names_its_few_rows(tmp_path: Path) -> None:
    path, _ = table_file(tmp_path)
    flip(path, 4096 + 94 * 4096)
    with MappedTable.open(path) as table, pytest.raises(RowStoreError, match="page 94, rows 4982 to 4999,"):
        table.gather(np.array([ROWS - 1]))


def test_a_flipped_bit_in_the_checksums_is_found(tmp_path: Path) -> None:
    path, _ = table_file(tmp_path)
    flip(path, 4096 + 95 * 4096 + 4 * 7)
    with MappedTable.open(path) as table, pytest.raises(RowStoreError, match="page 7, rows 371 to 423,"):
        table.gather(EVERY_ROW)


def test_a_flipped_bit_is_found_at_open_when_asked(tmp_path: Path) -> None:
    path, _ = table_file(tmp_path)
    flip(path, 4096 + 7 * 4096)
    with pytest.raises(RowStoreError, match="page 7, rows 371 to 423,"):
        MappedTable.open(path, verify="open")
    MappedTable.open(path, verify="off").close()


def test_damage_after_the_first_touch_is_found_by_the_time_stamp(tmp_path: Path) -> None:
    path, _ = table_file(tmp_path)
    with MappedTable.open(path) as table:
        table.gather(EVERY_ROW)
        flip(path, 4096 + 7 * 4096)
        os.utime(path, ns=(0, 1))
        with pytest.raises(RowStoreError, match="page 7, rows 371 to 423,"):
            table.gather(EVERY_ROW)


@pytest.mark.parametrize("size", [0, 8192, 300_000, 4096 + 95 * 4096 + 4 * 96 + 1])
def test_a_file_truncated_while_mapped_does_not_kill_the_process(tmp_path: Path, size: int) -> None:
    path, _ = table_file(tmp_path)
    code = f"""
import os, sys
import numpy as np
from pathlib import Path
from engram.quantize.mapped import MappedTable
from engram.quantize.row_store import RowStoreError
table = MappedTable.open(Path(sys.argv[1]))
table.gather(np.arange(100))
os.truncate(sys.argv[1], {size})
try:
    table.gather(np.arange({ROWS}))
except RowStoreError as error:
    print(error)
"""
    child = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
    assert f"{path} (layer 3) has {size} bytes, it had" in child.stdout


def test_a_replaced_file_keeps_serving_its_old_rows(tmp_path: Path) -> None:
    path, expected = table_file(tmp_path)
    with MappedTable.open(path) as table:
        values = np.zeros((ROWS + 1, WIDTH), dtype=np.float32)
        write_table(path, [values], rows=ROWS + 1, width=WIDTH, codec=CODECS["int8-row"], layer=3)
        assert np.array_equal(table.gather(EVERY_ROW), expected)
    with pytest.raises(RowStoreError, match="has rows 5001, expected 5000"):
        MappedTable.open(path, rows=ROWS)


def test_pages_are_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = table_file(tmp_path)
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, offset, length, advice: calls.append((offset, length)))
    with MappedTable.open(path) as table:
        for pages in ([3, 4, 5, 9], [4, 9, 10], [3, 10]):
            table.read_ahead(table.claim(np.array(pages)))
    assert calls == [(4 * 4096, 3 * 4096), (10 * 4096, 4096), (11 * 4096, 4096)]


def test_a_closed_table_closes_its_file(tmp_path: Path) -> None:
    path, _ = table_file(tmp_path)
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    table = MappedTable.open(path)
    table.gather(EVERY_ROW)
    table.close()
    table.close()
    assert (os.listdir("/proc/self/fd") if before else []) == before


def test_a_budget_changes_memory_not_rows(tmp_path: Path) -> None:
    path, expected = table_file(tmp_path, "f32", 40_000, 72)
    rows = np.random.default_rng(0).integers(0, 40_000, 3000)
    with MappedTable.open(path) as table:
        budget = Budget(limit_bytes=1 << 20)
        budget.adopt(table)
        assert np.array_equal(table.gather(rows), expected[rows])
        assert np.array_equal(table.gather(np.sort(rows)), expected[np.sort(rows)])
        assert budget.trims > 0


def test_pieces_cover_a_gather_and_map_few_folios() -> None:
    pages = np.random.default_rng(0).integers(0, 100_000, 5000)
    pieces = list(Budget(limit_bytes=16 << 20).pieces(pages))
    assert np.array_equal(np.concatenate([pages[piece] for piece in pieces]), pages)
    assert max(len(np.unique(pages[piece] // 512)) for piece in pieces) <= 4
    assert len(list(Budget(limit_bytes=16 << 20).pieces(np.sort(pages)))) == -(-196 // 4)
