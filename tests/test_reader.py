"""The reader: three placements, the same bits; damage, limits and counters."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from widths import fitting

from engram.builders import process_memory
from engram.kernels.codecs import CODECS, Floats
from engram.quantize.mapped import MappedTable
from engram.quantize.row_store import RowStoreError, write_table
from engram.runtime.reader import PLACEMENTS, Ints, ReaderError, RowReader

SIZES = {1: 3000, 5: 777}  # rows of each layer's table


@dataclass
class Tables:
    """All that a reader needs of a package."""

    layers: dict[int, MappedTable]


def tables(folder: Path, codec: str = "nf4", width: int = 72) -> tuple[Tables, dict[int, Floats]]:
    """Mapped tables, and what their rows decode to."""
    mapped, decoded = {}, {}
    for n, rows in SIZES.items():
        values = np.random.default_rng(n).standard_normal((rows, width)).astype(np.float32)
        path = folder / f"layer-{n:02d}.safetensors"
        write_table(path, [values], rows=rows, width=width, codec=CODECS[codec], layer=n)
        mapped[n] = MappedTable.open(path)
        decoded[n] = CODECS[codec].decode(CODECS[codec].encode(values), width)
    return Tables(mapped), decoded


def random_rows(shape: tuple[int, int, int], seed: int = 0) -> dict[int, Ints]:
    generator = np.random.default_rng(seed)
    rows = {n: generator.integers(0, size, shape) for n, size in SIZES.items()}
    for n, ids in rows.items():
        ids.reshape(-1)[::3] = SIZES[n] - 1  # many repetitions of one row
    return rows


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_gives_the_rows_side_by_side(tmp_path: Path, placement: str, codec: str) -> None:
    width = fitting(codec, 72)
    package, decoded = tables(tmp_path, codec, width)
    reader = RowReader(package, placement)
    rows = random_rows((2, 37, 16))
    ticket = reader.ask(rows)
    for n in (5, 1, 5):  # any order, any number of times
        poisoned = np.full((2, 37, 16 * width), np.nan, dtype=np.float32)
        assert reader.take(ticket, n, out=poisoned) is poisoned
        assert poisoned.tobytes() == decoded[n][rows[n]].tobytes()
    reader.close()


def test_a_budget_gives_the_same_bits(tmp_path: Path) -> None:
    package, decoded = tables(tmp_path, "f32")
    reader = RowReader(package, "disk", cache_bytes=0)
    rows = random_rows((1, 300, 8))
    assert reader.take(reader.ask(rows), 1).tobytes() == decoded[1][rows[1]].tobytes()
    assert reader.budget is not None and reader.budget.trims > 0
    reader.close()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_threads_share_a_reader(tmp_path: Path, placement: str) -> None:
    package, decoded = tables(tmp_path)
    reader = RowReader(package, placement, cache_bytes=1 << 20)

    def work(seed: int) -> bool:
        rows = random_rows((1, 20, 8), seed)
        ticket = reader.ask(rows)
        return all(reader.take(ticket, n).tobytes() == decoded[n][rows[n]].tobytes() for n in rows)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(100)))
    assert reader.counters()["rows_asked"] == 100 * 2 * 160
    reader.close()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_an_empty_batch_is_an_empty_answer(tmp_path: Path, placement: str, shape: tuple[int, int, int]) -> None:
    package, _ = tables(tmp_path)
    reader = RowReader(package, placement)
    taken = reader.take(reader.ask({1: np.empty(shape, dtype=np.int64)}), 1)
    assert taken.shape == (*shape[:2], 8 * 72)
    assert reader.counters()["rows_read"] == 0
    reader.close()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_counters_count_distinct_rows(tmp_path: Path, placement: str) -> None:
    package, _ = tables(tmp_path)  # 42 bytes a row, 97 rows a page
    reader = RowReader(package, placement)
    reader.take(reader.ask({1: np.array([[[7, 7, 96], [97, 7, 7]]])}), 1)
    stored = 288 if placement == "none" else 42
    assert reader.counters() == {
        "rows_asked": 6, "rows_read": 3, "bytes_read": 3 * stored, "pages_touched": 2 if placement == "disk" else 0,
    }  # fmt: skip
    assert reader.table_bytes == sum(table.path.stat().st_size for table in package.layers.values())
    reader.close()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("row", [-1, 3000])
def test_a_row_outside_the_table_is_refused_when_asked(tmp_path: Path, placement: str, row: int) -> None:
    package, _ = tables(tmp_path)
    reader = RowReader(package, placement)
    with pytest.raises(RowStoreError, match=f"row {row} is outside the table of layer 1"):
        reader.ask({1: np.array([[[0, row]]])})
    reader.close()


def test_a_layer_without_a_table_is_refused(tmp_path: Path) -> None:
    package, _ = tables(tmp_path)
    reader = RowReader(package)
    with pytest.raises(ReaderError, match=r"layer 2 has no table, the package has layers \[1, 5\]"):
        reader.ask({2: np.zeros((1, 1, 1), dtype=np.int64)})
    ticket = reader.ask({1: np.zeros((1, 1, 1), dtype=np.int64)})
    with pytest.raises(ReaderError, match=r"rows of layer 5 were not asked for, only of \[1\]"):
        reader.take(ticket, 5)
    with pytest.raises(ReaderError, match="expected \\[B, T, C\\]"):
        reader.ask({1: np.zeros((1, 1), dtype=np.int64)})
    with pytest.raises(ReaderError, match="out must be contiguous float32"):
        reader.take(ticket, 1, out=np.zeros((1, 1, 71), dtype=np.float32))
    reader.close()


def test_an_unknown_placement_is_refused(tmp_path: Path) -> None:
    package, _ = tables(tmp_path)
    with pytest.raises(ReaderError, match="placement 'gpu' is not known"):
        RowReader(package, "gpu")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_damaged_page_never_becomes_a_row(tmp_path: Path, placement: str) -> None:
    package, _ = tables(tmp_path)
    with package.layers[1].path.open("r+b") as file:
        file.seek(4096 + 3 * 4096 + 5)
        file.write(b"\xff\xff")
    with pytest.raises(RowStoreError, match=r"\(layer 1\) is damaged: page 3, rows 291 to 387"):
        reader = RowReader(package, placement)
        reader.take(reader.ask({1: np.full((1, 1, 1), 350)}), 1)


@pytest.mark.parametrize(("placement", "needed"), [("ram", 3777 * 42), ("none", 3777 * 288)])
def test_tables_larger_than_memory_are_refused_beforehand(
    tmp_path: Path, placement: str, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, _ = tables(tmp_path)
    monkeypatch.setattr("engram.runtime.reader.available_bytes", lambda: needed - 1)
    with pytest.raises(
        ReaderError, match=f"{placement!r} needs {needed:,} bytes for the tables, {needed - 1:,} are"
    ) as caught:
        RowReader(package, placement)
    assert "--offload disk" in caught.value.hint
    monkeypatch.setattr("engram.runtime.reader.available_bytes", lambda: needed)
    RowReader(package, placement).close()


def test_a_refused_allocation_is_a_reader_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, _ = tables(tmp_path)

    def refuse(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr("engram.runtime.reader.available_bytes", lambda: None)
    monkeypatch.setattr("engram.runtime.reader.np.empty", refuse)
    with pytest.raises(ReaderError, match="needs 158,634 bytes for the tables, the system refuses them"):
        RowReader(package, "ram")


def test_available_memory_is_a_plausible_number() -> None:
    available = process_memory.available_bytes()
    assert available is None or 1 << 20 < available < 1 << 50


LIMITED = """
import os, resource, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from engram.quantize.mapped import MappedTable
from engram.runtime.reader import ReaderError, RowReader

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10

table = MappedTable.open(Path(sys.argv[1]))
limit = resident("VmData") + (64 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    RowReader(SimpleNamespace(layers={0: table}), "ram")
except ReaderError as error:
    print(error)
budget = 16 << 20
reader = RowReader(SimpleNamespace(layers={0: table}), "disk", cache_bytes=budget)
before, most = resident("RssFile"), 0
generator = np.random.default_rng(0)
for _ in range(40):
    rows = generator.integers(0, table.rows, (1, 32, 16))
    memory = reader.take(reader.ask({0: rows}), 0)
    assert np.array_equal(memory[0, :, ::64], (rows[0] % 251).astype(np.float32))
    most = max(most, resident("RssFile") - before)
print(most, reader.budget.trims)
reader.close()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's accounting of resident memory")
def test_disk_serves_a_table_larger_than_the_memory_allowed(tmp_path: Path) -> None:
    """A 256 MiB table, 64 MiB of memory, a 16 MiB budget: `ram` is refused, `disk` works within the budget."""
    rows, width = 1 << 20, 64
    ids = np.arange(rows) % 251
    blocks = (np.repeat(ids[begin : begin + 8192, None], width, 1).astype(np.float32) for begin in range(0, rows, 8192))
    path = tmp_path / "layer-00.safetensors"
    write_table(path, blocks, rows=rows, width=width, codec=CODECS["f32"], layer=0)
    child = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    refused, figures = child.stdout.splitlines()
    assert refused.startswith("placement 'ram' needs 268,435,456 bytes for the tables, ")
    most, trims = map(int, figures.split())
    assert most <= 18 << 20  # the budget and one folio
    assert trims > 0
