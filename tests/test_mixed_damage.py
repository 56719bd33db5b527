"""Mixed tables that are damaged, mixed up or altered: an error with a name, never a wrong row."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import mixed_tables
import numpy as np
import pytest
from mixed_tables import WIDTH, random_classes
from ways import WAYS, flip

from engram import Progress
from engram.kernels.codecs import CODECS
from engram.quantize import class_map
from engram.quantize.mixed_file import ClassFile, MapHeader, read_map
from engram.quantize.mixed_table import MixedTable
from engram.quantize.row_store import RowStoreError, write_table

ROWS = 3000
CLASSES = random_classes(ROWS)


def part(path: Path, number: int) -> Path:
    return path.with_name(f"layer-03.{number}.safetensors")


def rewritten(path: Path, change: Callable[[np.ndarray], None], header: MapHeader | None = None) -> None:  # type: ignore[type-arg]
    """Alter the records (uint32 [B, 8]) and make the checksum fit again."""
    found, found_map = read_map(path)
    records = found_map.records.copy()
    change(records.view(np.uint32))
    head = (header or found).bytes
    path.write_bytes(head + records.tobytes() + zlib.crc32(head + records.tobytes()).to_bytes(4, "little"))


def test_a_flipped_bit_anywhere_in_the_map_is_found(tmp_path: Path) -> None:
    path, _, _ = mixed_tables.write(tmp_path, random_classes(200))
    content = path.read_bytes()
    for position in range(len(content)):
        flip(path, position, bit=position % 8)
        with pytest.raises(RowStoreError, match=f"class map {path}"):
            MixedTable.open(path)
        path.write_bytes(content)
    for size in (0, 7, 8, 100, len(content) - 5, len(content) - 1, len(content) + 1):
        os.truncate(path, size)
        with pytest.raises(RowStoreError, match=f"class map {path}"):
            MixedTable.open(path)
        path.write_bytes(content)
    path.unlink()
    with pytest.raises(RowStoreError, match=f"class map {path} cannot be read: No such file"):
        MixedTable.open(path)
    with pytest.raises(RowStoreError, match="cannot be read: Is a directory"):
        MixedTable.open(path.parent)


def set_(block: int, word: int, value: int) -> Callable[[np.ndarray], None]:  # type: ignore[type-arg]
    def change(words: np.ndarray) -> None:  # type: ignore[type-arg]
        words[block, word] += np.uint32(value)

    return change


def behind_the_last(words: np.ndarray) -> None:  # type: ignore[type-arg]
    words[-1, 1] |= np.uint32(1 << 31)  # ROWS leaves the last record 56 rows


def other_class(words: np.ndarray) -> None:  # type: ignore[type-arg]
    """The last row changes its class; no rank follows it."""
    words[-1, 1] ^= np.uint32(1 << (ROWS % 64 - 1 - 32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_(7, 4, 1), "has ranks in the record of rows 448 to 511 that its classes do not give"),
        (set_(7, 5, 1), "has ranks in the record of rows 448 to 511"),
        (set_(46, 6, 1), "has ranks in the record of rows 2944 to 3007"),
        (set_(0, 7, 1), "has a spare number in the record of rows 0 to 63"),
        (set_(3, 0, 1), "has ranks in the record of rows"),  # a plane
        (behind_the_last, "has classes behind its last row 2999"),
        (other_class, r"has classes of \[.*\] rows, its header says"),
    ],
)
def test_records_that_cannot_be_are_refused_under_a_sound_checksum(
    tmp_path: Path, change: Callable[[np.ndarray], None], words: str  # type: ignore[type-arg]
) -> None:
    path, _, _ = mixed_tables.write(tmp_path, CLASSES)
    rewritten(path, lambda words: None)
    MixedTable.open(path).close()
    rewritten(path, change)
    with pytest.raises(RowStoreError, match=f"class map {path} {words}"):
        MixedTable.open(path)


def test_headers_that_cannot_be_are_refused_under_a_sound_checksum(tmp_path: Path) -> None:
    path, _, _ = mixed_tables.write(tmp_path, CLASSES)
    sound, content = read_map(path)[0], path.read_bytes()
    a, b, dropped, d = sound.classes
    five = ClassFile("f32", 1, 0, None)
    cases = [
        (MapHeader(WIDTH, ROWS, 3, [a, b, dropped]), "make no table of 3000 rows"),  # class 3 has rows but no entry
        (MapHeader(WIDTH, ROWS, 3, [a, b, dropped, d, five]), "5 classes; a mixed table has 1 to 4"),
        (MapHeader(WIDTH, ROWS, 3, []), "0 classes"),
        (MapHeader(WIDTH, ROWS, 3, [b, a, dropped, d]), "has classes of .* rows, its header says"),
        (MapHeader(WIDTH, ROWS, 3, [a._replace(seal=None), b, dropped, d]), "class 0 of .* has codec 'f32' and"),
        (MapHeader(WIDTH, ROWS, 3, [a, b, dropped._replace(seal="0" * 64), d]), "class 2 of .* has codec None"),
        (MapHeader(WIDTH, ROWS, 3, [a, b, dropped._replace(codec_version=1), d]), "class 2 of"),
        (MapHeader(WIDTH, ROWS, 3, [a._replace(codec="int3"), b, dropped, d]), "class 0: .* 'int3' is not known"),
        (MapHeader(WIDTH, ROWS, 3, [a._replace(codec_version=9), b, dropped, d]), "codec 'f32' has version 9"),
        (MapHeader(WIDTH, ROWS, 3, [a._replace(rows=float(a.rows)), b, dropped, d]), "of the wrong type"),
        (MapHeader(0, ROWS, 3, sound.classes), "width 0 must lie within 1 and 4096"),
        (MapHeader(WIDTH + 1, ROWS, 3, sound.classes), "layer-03.0.safetensors has width 40, expected 41"),
        (MapHeader(WIDTH, ROWS, -1, sound.classes), "layer -1 must lie within 0 and 2147483648"),
        (MapHeader(WIDTH, ROWS, 4, sound.classes), "layer-03.0.safetensors has layer 3, expected 4"),
        (MapHeader(WIDTH, ROWS + 1, 3, sound.classes), "make no table of 3001 rows"),
    ]  # fmt: skip
    for header, words in cases:
        rewritten(path, lambda words: None, header)
        with pytest.raises(RowStoreError, match=words):
            MixedTable.open(path)
        path.write_bytes(content)


@pytest.mark.parametrize("version", ["0", "2"])
def test_another_version_is_refused(tmp_path: Path, version: str) -> None:
    path, _, _ = mixed_tables.write(tmp_path, CLASSES)
    path.write_bytes(path.read_bytes().replace(b'"version":"1"', f'"version":"{version}"'.encode()))
    with pytest.raises(RowStoreError, match=rf"has format and version \('engram-mixed', '{version}'\)"):
        MixedTable.open(path)


def missing(path: Path) -> None:
    part(path, 1).unlink()


def truncated(path: Path) -> None:
    os.truncate(part(path, 1), part(path, 1).stat().st_size - 1)


def swapped_classes(path: Path) -> None:
    """Two classes of the same codec, width, layer and number of rows."""
    part(path, 0).rename(path.with_name("x"))
    part(path, 1).rename(part(path, 0))
    path.with_name("x").rename(part(path, 1))


def replaced(codec: str = "int8", rows: int = 0, width: int = WIDTH, layer: int = 3) -> Callable[[Path], None]:
    """A sound table file of another kind, or of the same kind with other rows, as class 1."""

    def damage(path: Path) -> None:
        count = int((CLASSES == 1).sum()) + rows
        block = np.ones((count, width), np.float32)
        write_table(part(path, 1), [block], rows=count, width=width, codec=CODECS[codec], layer=layer)

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing, "layer-03.1.safetensors cannot be opened: No such file"),
        (truncated, "layer-03.1.safetensors has .* it is truncated"),
        (swapped_classes, "layer-03.0.safetensors has codec 'int8', expected 'f32'"),
        (replaced(), "layer-03.1.safetensors is whole, but not the one that the class map .* describes as class 1"),
        (replaced(rows=1), "layer-03.1.safetensors has rows"),
        (replaced(width=41), "layer-03.1.safetensors has width 41, expected 40"),
        (replaced(layer=4), "layer-03.1.safetensors has layer 4, expected 3"),
        (replaced(codec="nf4"), "layer-03.1.safetensors has codec 'nf4', expected 'int8'"),
    ],
)
def test_a_part_that_is_not_the_one_is_refused(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    path, _, _ = mixed_tables.write(tmp_path, CLASSES)
    damage(path)
    with pytest.raises(RowStoreError, match=words):
        MixedTable.open(path)


def test_classes_of_one_shape_cannot_change_places(tmp_path: Path) -> None:
    class_N = np.arange(200, dtype=np.uint8) % 2
    path, _, _ = mixed_tables.write(tmp_path, class_N, ("int8", "int8"))
    MixedTable.open(path).close()
    swapped_classes(path)
    with pytest.raises(RowStoreError, match="layer-03.0.safetensors is whole, but not the one .* as class 0"):
        MixedTable.open(path)


def test_another_table_than_expected_is_refused(tmp_path: Path) -> None:
    path, _, _ = mixed_tables.write(tmp_path, CLASSES)
    for name, value in (("rows", 2999), ("width", 41), ("layer", 2), ("codec", "int8")):
        with pytest.raises(RowStoreError, match=f"layer-03.mixed.safetensors has {name} .*, expected {value!r}"):
            MixedTable.open(path, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(RowStoreError, match="verify 'never' is not known"):
        MixedTable.open(path, verify="never")


@pytest.mark.parametrize("io", WAYS)
def test_a_flipped_bit_in_a_part_is_named_and_other_classes_go_on(tmp_path: Path, io: str) -> None:
    path, values, _ = mixed_tables.write(tmp_path, CLASSES)
    expected = mixed_tables.model(values, CLASSES)
    flip(part(path, 1), 4096 + 50)
    words = re.escape(f"table file {part(path, 1)} (layer 3) is damaged: page 0, rows 0 to ")
    try:
        table = MixedTable.open(path, io=io)
    except RowStoreError as error:
        pytest.skip(str(error))
    with table:
        others = np.flatnonzero(CLASSES != 1)
        out = np.full((len(others), WIDTH), np.nan, np.float32)
        table.decode(others, out)
        assert out.tobytes() == np.stack([expected[r] for r in others.tolist()]).tobytes()
        for use in (lambda: table.decode(np.arange(ROWS), np.empty((ROWS, WIDTH), np.float32)), table.verify_all,
                    lambda: list(table.decoded_blocks()), lambda: table.in_memory(lambda rows: None)):  # fmt: skip
            with pytest.raises(RowStoreError, match=words):
                use()
    with pytest.raises(RowStoreError, match=words):
        MixedTable.open(path, verify="open", io=io)


@pytest.mark.parametrize("io", WAYS)
def test_files_that_change_while_open_give_no_wrong_row(tmp_path: Path, io: str) -> None:
    """The map may even vanish; a class file that was overwritten with a sound one of the same shape is refused."""
    path, values, _ = mixed_tables.write(tmp_path, CLASSES)
    expected = np.stack(list(mixed_tables.model(values, CLASSES).values()))
    try:
        table = MixedTable.open(path, io=io)
    except RowStoreError as error:
        pytest.skip(str(error))
    with table:
        content = bytearray(path.read_bytes())
        content[-400:] = b"\xff" * 400
        path.write_bytes(content)
        out = np.full((ROWS, WIDTH), np.nan, np.float32)
        assert table.decode(np.arange(ROWS), out).tobytes() == expected.tobytes()
        path.unlink()
        assert table.decode(np.arange(ROWS), out).tobytes() == expected.tobytes()
        whole = part(path, 1).read_bytes()
        replaced()(tmp_path / "tables" / "y.mixed")  # writes layer-03.1 anew under its name: ours stays as it was
        assert table.decode(np.arange(ROWS), out).tobytes() == expected.tobytes()
        assert len(whole) == part(path, 1).stat().st_size
        with part(path, 0).open("r+b") as file:  # in place
            file.write(mixed_rows_of_ones(tmp_path, path))
        with pytest.raises(RowStoreError, match="layer-03.0.safetensors .* was overwritten while in use|is damaged"):
            table.decode(np.arange(ROWS), out)


def test_a_class_file_overwritten_before_it_is_copied_is_refused(tmp_path: Path) -> None:
    """A sound file of the same shape, in the same place: its checksums fit, its seal does not."""
    path, _, _ = mixed_tables.write(tmp_path, CLASSES)
    (tmp_path / "again" / "tables").mkdir(parents=True)
    with MixedTable.open(path) as table:
        with part(path, 0).open("r+b") as file:
            file.write(mixed_rows_of_ones(tmp_path, path))
        with pytest.raises(RowStoreError, match="layer-03.0.safetensors was overwritten while it was copied"):
            table.copy(tmp_path / "again", Progress())
    assert not (tmp_path / "again" / "tables" / path.name).exists()


def mixed_rows_of_ones(folder: Path, path: Path) -> bytes:
    count = int((CLASSES == 0).sum())
    other = folder / "other"
    ones = np.ones((count, WIDTH), np.float32)
    write_table(other, [ones], rows=count, width=WIDTH, codec=CODECS["f32"], layer=3)
    return other.read_bytes()


def test_random_bytes_are_no_map(tmp_path: Path) -> None:
    path = tmp_path / "layer-03.mixed.safetensors"
    text = json.dumps({"__metadata__": {"format": "engram-rows", "version": "2"}}).encode()
    for content in (b"", b"\0" * 4000, b"\xff" * 4000, len(text).to_bytes(8, "little") + text,
                    np.random.default_rng(0).bytes(4000), (16).to_bytes(8, "little") + b"[" * 16):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(RowStoreError, match="class map .*layer-03.mixed.safetensors"):
            MixedTable.open(path)


def test_the_class_map_of_the_largest_table_is_computed_without_overflow() -> None:
    """Ranks reach 2^32 - 64: the last record of 2^32 rows, all but its own in one class."""
    for number in (1, 2, 3):
        records = np.zeros((2, 4), dtype="<u8")
        before = np.zeros(4, dtype=np.int64)
        before[number] = (1 << 32) - 128
        records[:, 0] = np.uint64((1 << 64) - 1) if number & 1 else 0
        records[:, 1] = np.uint64((1 << 64) - 1) if number & 2 else 0
        class_map._set_ranks(records, before)
        ranks = records.view("<u4")[:, 4:].tolist()
        expected = [[0] * 4, [0] * 4]
        expected[0][number - 1], expected[1][number - 1] = (1 << 32) - 128, (1 << 32) - 64
        assert ranks == expected
