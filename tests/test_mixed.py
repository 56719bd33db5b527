"""Mixed tables: every row has the bits that its own class's codec gives it, however it is asked for."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mixed_tables
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_tables import NAMES, WIDTH, random_classes
from safetensors.numpy import load_file
from ways import WAYS

from engram import Progress
from engram.kernels.codecs import CODECS, Bytes, CodecError, Floats
from engram.quantize.class_map import ClassMap
from engram.quantize.mixed_file import part_name
from engram.quantize.mixed_table import MixedTable
from engram.quantize.mixed_writer import MixedWriter
from engram.quantize.row_store import RowStoreError
from engram.quantize.row_table import Budget
from engram.runtime.reader import PLACEMENTS, RowReader

PATTERNS: dict[str, Bytes] = {
    "one row": np.array([1], np.uint8),
    "one row that is dropped": np.array([2], np.uint8),
    "63 rows": random_classes(63),
    "64 rows": random_classes(64),
    "65 rows": random_classes(65),
    "128 rows": random_classes(128),
    "129 rows": random_classes(129),
    "all of class 0": np.zeros(200, np.uint8),
    "all of class 3": np.full(200, 3, np.uint8),
    "all dropped": np.full(200, 2, np.uint8),
    "an empty class in the middle": np.arange(300, dtype=np.uint8) % 2 * 3,
    "every other row": np.arange(1000, dtype=np.uint8) % 4,
}


def open_or_skip(path: Path, io: str = "auto", **more: Any) -> MixedTable:
    try:
        return MixedTable.open(path, io=io, **more)
    except RowStoreError as error:
        if io == "uring" and "cannot be used here" in str(error):
            pytest.skip(str(error))
        raise


def as_array(rows: dict[int, Floats]) -> Floats:
    return np.stack([rows[r] for r in range(len(rows))])


def requests(rows: int) -> list[Any]:
    rng = np.random.default_rng(rows)
    return [np.arange(rows), np.arange(rows)[::-1], rng.integers(0, rows, (3, 4, 5)), np.array([rows - 1, 0, 0]),
            np.empty(0, np.int64), np.empty((2, 0, 3), np.int64)]  # fmt: skip


def check(table: MixedTable, expected_ND: Floats) -> None:
    """Every request, as float32 and as bf16, into poisoned buffers, taken twice."""
    for rows in requests(len(expected_ND)):
        wanted = expected_ND[rows.reshape(-1)]
        ticket = table.ask(rows)
        for threads in (1, 0):
            out = np.full((rows.size, table.width), np.nan, dtype=np.float32)
            assert table.take(ticket, out, threads=threads) is out
            assert out.tobytes() == wanted.tobytes()
        as_bf16 = np.full(rows.size * table.width, 0xFFFF, dtype=np.uint16)
        table.take(ticket, as_bf16)
        rounded = torch.from_numpy(wanted.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
        assert as_bf16.tobytes() == rounded.tobytes()
    firsts, blocks = zip(*table.decoded_blocks(), strict=True)
    assert np.concatenate(blocks).tobytes() == expected_ND.tobytes() and firsts[0] == 0


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("name", PATTERNS)
def test_every_row_is_what_its_own_codec_gives(tmp_path: Path, name: str, io: str) -> None:
    class_N = PATTERNS[name]
    path, values, _ = mixed_tables.write(tmp_path, class_N)
    with open_or_skip(path, io) as table:
        check(table, as_array(mixed_tables.model(values, class_N)))
        assert table.rows == len(class_N) and table.io == (io if table.parts else "memory")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_classes_and_any_requests(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 300), "rows")
    class_N = np.array(data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows), "classes"), np.uint8)
    names = tuple(data.draw(st.lists(st.sampled_from(["bf16", "int8-row", "nf4", None]), min_size=4, max_size=4)))
    path, values, _ = mixed_tables.write(tmp_path_factory.mktemp("any"), class_N, names, width=6)
    expected = as_array(mixed_tables.model(values, class_N, names))
    with MixedTable.open(path) as table:
        assert np.array_equal(table.class_map.classes(0, rows), class_N)
        asked = np.array(data.draw(st.lists(st.integers(0, rows - 1), max_size=80), "asked"), np.int64)
        out = np.full((len(asked), 6), np.nan, np.float32)
        assert table.decode(asked, out).tobytes() == expected[asked].tobytes()


def test_a_hundred_thousand_rows(tmp_path: Path) -> None:
    """Ranks over many records; the model goes by class here, not by row."""
    class_N = random_classes(100_003, seed=5)
    path, values, entry = mixed_tables.write(tmp_path, class_N)
    expected = np.zeros_like(values)
    for number, name in enumerate(NAMES):
        if name is not None:
            here = class_N == number
            expected[here] = CODECS[name].decode(CODECS[name].encode(values[here]), WIDTH)
    with MixedTable.open(path, verify="open", codec="mixed", rows=100_003, width=WIDTH, layer=3) as table:
        check(table, expected)
        assert table.class_map.counts == [int((class_N == c).sum()) for c in range(4)]
        for begin, end in ((0, 1), (63, 65), (64, 64), (1, 100_003), (99_999, 100_003)):
            assert np.array_equal(table.class_map.classes(begin, end), class_N[begin:end])
    assert entry["bytes"] == path.stat().st_size < 100_003 * 0.51 + 2000


def test_ranks_count_rows_before(tmp_path: Path) -> None:
    """The ranks that the map gives, against counting one row after another."""
    class_N = random_classes(1000, seed=9)
    class_map = ClassMap.build(1000, [class_N])
    seen, expected = [0] * 4, []
    for c in class_N.tolist():
        expected.append(seen[c])
        seen[c] += 1
    got, which = np.full(1000, -1), np.full(1000, 9)
    for share in class_map.split(np.arange(1000)):
        assert share.places is not None
        got[share.places], which[share.places] = share.ranks, share.number
    assert got.tolist() == expected and which.tolist() == class_N.tolist() and class_map.counts == seen
    for row in (0, 1, 63, 64, 500, 999, 1000):
        assert class_map.before(row) == np.bincount(class_N[:row], minlength=4).tolist()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_reader_gives_the_same_bits_in_every_placement(tmp_path: Path, placement: str) -> None:
    class_N = random_classes(700)
    path, values, _ = mixed_tables.write(tmp_path, class_N)
    expected = as_array(mixed_tables.model(values, class_N))
    stored = np.array([4 * WIDTH, CODECS["int8"].row_bytes(WIDTH), 0, CODECS["nf4"].row_bytes(WIDTH)])

    class Tables:
        layers = {3: MixedTable.open(path)}

    reader = RowReader(Tables(), placement)
    rows = np.random.default_rng(3).integers(0, 700, (2, 9, 8))
    ticket = reader.ask({3: rows})
    for kind, poison in ((np.float32, np.nan), (np.uint16, 0xFFFF)):
        out = np.full((2, 9, 8 * WIDTH), poison, dtype=kind)
        reader.take(ticket, 3, out=out)
        if kind == np.float32:
            assert out.tobytes() == expected[rows].tobytes()
    read = 4 * WIDTH * rows.size if placement == "none" else int(stored[class_N[rows]].sum())
    counters = reader.counters()
    assert counters["rows_read"] == 2 * rows.size and counters["bytes_read"] == 2 * read
    assert (counters["pages_read"] > 0) == (placement == "disk")
    assert reader.take(reader.ask({3: rows[:, :0]}), 3).shape == (2, 0, 8 * WIDTH)
    with pytest.raises(RowStoreError, match="row 700 is outside the table of layer 3"):
        reader.ask({3: np.array([[[0, 700]]])})
    resident = reader.resident_bytes()
    assert resident is None or resident >= Tables.layers[3].held_bytes == 352
    reader.close()


def test_a_budget_holds_for_all_parts(tmp_path: Path) -> None:
    class_N = random_classes(5000)
    path, values, _ = mixed_tables.write(tmp_path, class_N)
    with MixedTable.open(path) as table:
        budget = Budget(0)
        budget.adopt(table)
        check(table, as_array(mixed_tables.model(values, class_N)))
        assert budget.trims > 0 and all(part.budget is budget for part in table.parts.values())


def test_threads_share_a_table(tmp_path: Path) -> None:
    class_N = random_classes(3000)
    path, values, _ = mixed_tables.write(tmp_path, class_N)
    expected = as_array(mixed_tables.model(values, class_N))
    with MixedTable.open(path) as table:

        def work(seed: int) -> bool:
            rows = np.random.default_rng(seed).integers(0, 3000, 200)
            out = np.full((200, WIDTH), np.nan, np.float32)
            return table.decode(rows, out).tobytes() == expected[rows].tobytes()

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(200)))


@pytest.mark.parametrize("row", [-1, 200, 1 << 40, -(1 << 40)])
def test_a_row_outside_is_refused_when_asked(tmp_path: Path, row: int) -> None:
    path, _, _ = mixed_tables.write(tmp_path, random_classes(200))
    with MixedTable.open(path) as table:
        with pytest.raises(RowStoreError, match=f"row {row} is outside the table of layer 3 .* which has 200 rows"):
            table.ask(np.array([5, row, 300]))
        with pytest.raises(RowStoreError, match=f"row {row} is outside"):
            table.check_ids(min(0, row), max(0, row))
        assert table.pages_read == 0


@pytest.mark.parametrize("out", [np.empty((3, WIDTH), np.float64), np.empty((2, WIDTH), np.float32),
                                 np.empty((WIDTH, 3), np.float32).T])  # fmt: skip
def test_an_unfit_buffer_is_refused(tmp_path: Path, out: Any) -> None:
    path, _, _ = mixed_tables.write(tmp_path, random_classes(200))
    with MixedTable.open(path) as table, pytest.raises(RowStoreError, match="out must be 120 contiguous values"):
        table.decode(np.arange(3), out)


def test_a_closed_table_says_so(tmp_path: Path) -> None:
    path, _, _ = mixed_tables.write(tmp_path, random_classes(200))
    table = MixedTable.open(path)
    ticket = table.ask(np.arange(200))
    table.close()
    for use in (lambda: table.ask(np.arange(3)), lambda: table.take(ticket, np.empty((200, WIDTH), np.float32)),
                lambda: list(table.decoded_blocks()), table.verify_all):  # fmt: skip
        with pytest.raises(RowStoreError, match=r"\(layer 3\) is closed"):
            use()


def test_a_closed_table_of_dropped_rows_says_so_too(tmp_path: Path) -> None:
    path, _, _ = mixed_tables.write(tmp_path, np.full(10, 2, np.uint8))
    table = MixedTable.open(path)
    ticket = table.ask(np.arange(10))
    table.close()
    for use in (lambda: table.ask(np.arange(3)), lambda: table.take(ticket, np.empty((10, WIDTH), np.float32))):
        with pytest.raises(RowStoreError, match=r"\(layer 3\) is closed"):
            use()


def test_loading_tells_of_every_row(tmp_path: Path) -> None:
    path, _, _ = mixed_tables.write(tmp_path, random_classes(300))
    told: list[int] = []
    with MixedTable.open(path) as table:
        table.in_memory(told.append)
    assert sum(told) == 300


def test_the_map_opens_in_stock_safetensors_and_a_copy_is_the_same(tmp_path: Path) -> None:
    class_N = random_classes(1000)
    path, _, entry = mixed_tables.write(tmp_path, class_N)
    tensors = load_file(path)
    assert tensors["classes"].shape == (16, 32) and tensors["classes"].dtype == np.uint8
    low, high = (np.unpackbits(tensors["classes"][:, at : at + 8], bitorder="little")[:1000] for at in (0, 8))
    assert np.array_equal(low + 2 * high, class_N)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"] == entry["seal"]
    (tmp_path / "again" / "tables").mkdir(parents=True)
    with MixedTable.open(path) as table:
        assert table.copy(tmp_path / "again", Progress()) == entry and table.seal() == entry["seal"]
        assert table.file_bytes == sum(p.stat().st_size for p in table.paths) and len(table.paths) == 4
    for file in (tmp_path / "tables").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / "tables" / file.name).read_bytes()


def test_the_bytes_of_the_map_are_those_of_the_specification(tmp_path: Path) -> None:
    """FORMAT.md 1.7 written down a second time, row by row."""
    class_N = random_classes(150, seed=4)
    path, _, entry = mixed_tables.write(tmp_path, class_N)
    records, before = b"", [0, 0, 0, 0]
    for begin in range(0, 150, 64):
        block = class_N[begin : begin + 64].tolist()
        low, high = (sum((c >> plane & 1) << i for i, c in enumerate(block)) for plane in (0, 1))
        records += struct.pack("<QQIIII", low, high, *before[1:], 0)
        for c in block:
            before[c] += 1
    seals = [hashlib.sha256(header_and_sums(tmp_path, n)).hexdigest() if n != 2 else None for n in range(4)]
    classes = ",".join(
        f'[\\"{name}\\",1,{before[n]},\\"{seals[n]}\\"]' if name else f"[null,null,{before[n]},null]"
        for n, name in enumerate(NAMES)
    )
    text = (
        '{"__metadata__":{"format":"engram-mixed","version":"1","width":"40","rows":"150","layer":"3",'
        f'"classes":"[{classes}]"}},"classes":{{"dtype":"U8","shape":[3,32],"data_offsets":[0,96]}},'
        '"crc32":{"dtype":"U32","shape":[1],"data_offsets":[96,100]}}'
    )
    text += " " * (-(8 + len(text)) % 32)
    body = struct.pack("<Q", len(text)) + text.encode() + records
    assert path.read_bytes() == body + struct.pack("<I", zlib.crc32(body))
    assert [part["seal"] for part in entry["parts"]] == seals


def header_and_sums(folder: Path, number: int) -> bytes:
    """The bytes of a class's file before its first page and behind its last."""
    content = (folder / "tables" / f"layer-03.{number}.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    pages = json.loads(content[8:begin])["rows"]["shape"][0]
    return content[:begin] + content[begin + pages * 4096 :]


# Writing


def writer(folder: Path, class_N: Bytes, names: tuple[str | None, ...] = NAMES) -> MixedWriter:
    (folder / "tables").mkdir(exist_ok=True)
    codecs = [None if name is None else CODECS[name] for name in names]
    return MixedWriter(folder, 1, ClassMap.build(len(class_N), [class_N]), codecs, width=4)


def test_what_is_lost_is_told_while_writing(tmp_path: Path) -> None:
    class_N = random_classes(300)
    values = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    with writer(tmp_path, class_N) as writing:
        told = [writing.append(values[:100]), writing.append(values[100:])]
    back = as_array(mixed_tables.model(values, class_N)).astype(np.float64)
    lost_N, whole_N = (np.concatenate(parts) for parts in zip(*told, strict=True))
    assert np.allclose(lost_N, np.square(back - values).sum(1), rtol=1e-12)
    assert np.allclose(whole_N, np.square(values.astype(np.float64)).sum(1), rtol=1e-12)
    assert (lost_N[class_N == NAMES.index(None)] == whole_N[class_N == NAMES.index(None)]).all()


def test_what_does_not_fit_the_map_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    class_N = random_classes(300)
    rows = np.ones((300, 4), np.float32)
    with pytest.raises(RowStoreError, match="layer 1: 299 rows arrived of the 300"), writer(tmp_path, class_N) as w:
        w.append(rows[:299])
    with pytest.raises(RowStoreError, match="layer 1: more rows arrive than the 300"), writer(tmp_path, class_N) as w:
        w.append(rows)
        w.append(rows[:1])
    with pytest.raises(RowStoreError, match="class 3 of layer 1 has .* rows and no codec"):
        writer(tmp_path, class_N, ("f32", "f32", "f32"))
    with pytest.raises(RowStoreError, match="5 codecs; a mixed table has 1 to 4"):
        writer(tmp_path, class_N, ("f32",) * 5)
    for number in (1, 2):  # stored, and dropped
        rows[...] = 1
        rows[int(np.flatnonzero(class_N == number)[3]), 2] = np.nan
        words = f"layer 1, rows of class {number}: row 3, column 2 is nan"
        with pytest.raises(CodecError, match=words), writer(tmp_path, class_N) as w:
            w.append(rows)
    assert not list((tmp_path / "tables").iterdir())


@pytest.mark.parametrize(("rows", "blocks", "words"), [
    (5, [[0, 1, 4, 0, 0]], "row 2 has class 4; classes are 0 to 3"),
    (5, [[0, 1], [0, 255, 0]], "row 3 has class 255"),
    (5, [[0, 1, 0, 0]], "classes of 4 rows arrived of the 5"),
    (5, [[0, 1, 0], [0, 1, 0]], "more classes arrive than the 5 rows"),
    (0, [], "a mixed table of 0 rows"),
    ((1 << 32) + 1, [], "it must have 1 to 4294967296"),
])  # fmt: skip
def test_classes_that_make_no_map_are_refused(rows: int, blocks: list[list[int]], words: str) -> None:
    with pytest.raises(RowStoreError, match=words):
        ClassMap.build(rows, [np.array(block, np.uint8) for block in blocks])
    with pytest.raises(RowStoreError, match="classes must be uint8"):
        ClassMap.build(3, [np.zeros(3, np.int64)])


def test_names_of_parts() -> None:
    assert part_name("tables/layer-12.mixed.safetensors", 2) == "tables/layer-12.2.safetensors"
