"""The table file: its exact bytes, what a stock reader sees, what is refused, and that nothing is half-written."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from widths import fitting

from engram.kernels.codecs import CODECS, CodecError, Floats
from engram.quantize.row_store import Geometry, RowStoreError, RowWriter, TableFile, read_geometry, write_table

GOLDEN = Path(__file__).parent / "golden"


def random_rows(rows: int, width: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def write(path: Path, rows: Floats, codec: str = "int8-row", layer: int = 3, block: int = 7) -> TableFile:
    blocks = (rows[begin : begin + block] for begin in range(0, len(rows), block))
    return write_table(path, blocks, rows=len(rows), width=rows.shape[1], codec=CODECS[codec], layer=layer)


def reread(path: Path) -> Geometry:
    handle = os.open(path, os.O_RDONLY)
    try:
        return read_geometry(handle, path)
    finally:
        os.close(handle)


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize(("rows", "width"), [(1, 2), (1000, 72), (2311, 30), (9, 1024)])
def test_every_byte_is_where_the_specification_puts_it(tmp_path: Path, codec: str, rows: int, width: int) -> None:
    width = fitting(codec, width)
    values = random_rows(rows, width)
    path = tmp_path / "layer-03.safetensors"
    table_file = write(path, values, codec)
    data = path.read_bytes()

    encoded = CODECS[codec].encode(values)
    per_page = 4096 // encoded.shape[1]
    pages = -(-rows // per_page)
    body = b""
    for page in range(pages):
        body += encoded[page * per_page : (page + 1) * per_page].tobytes().ljust(4096, b"\0")
    sums = b"".join(zlib.crc32(body[i : i + 4096]).to_bytes(4, "little") for i in range(0, len(body), 4096))
    length = int.from_bytes(data[:8], "little")
    sums += zlib.crc32(data[: 8 + length]).to_bytes(4, "little")
    assert (8 + length) % 4096 == 0
    assert data[8 + length :] == body + sums
    assert json.loads(data[8 : 8 + length])["__metadata__"] == {
        "format": "engram-rows", "version": "2", "codec": CODECS[codec].name, "codec_version": "1", "width": str(width),
        "rows": str(rows), "layer": "3",
    }  # fmt: skip
    assert asdict(table_file) == {
        "codec": CODECS[codec].name, "codec_version": 1, "rows": rows, "width": width, "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(), "seal": hashlib.sha256(data[: 8 + length] + sums).hexdigest(),
    }  # fmt: skip
    assert os.listdir(tmp_path) == [path.name]


def test_the_stock_safetensors_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    values = random_rows(500, 72)
    write(path, values, "nf4")
    with safe_open(path, "numpy") as file:
        rows, sums = file.get_tensor("rows"), file.get_tensor("page_crc32")
    assert rows.dtype == np.uint8 and rows.shape == (6, 4096)
    assert sums.dtype == np.uint32 and sums.tolist()[:-1] == [zlib.crc32(page.tobytes()) for page in rows]
    packed = rows[:, : 97 * 42].reshape(-1, 42)[:500]
    assert np.array_equal(packed, CODECS["nf4"].encode(values))


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_the_golden_file_is_written_again_bit_for_bit(tmp_path: Path, codec: str) -> None:
    width, golden = fitting(codec, 6), GOLDEN / f"table-{codec}.safetensors"
    values = np.arange(5 * width, dtype=np.float32).reshape(5, width) - 11
    write(tmp_path / "t", values, codec, layer=15)
    assert (tmp_path / "t").read_bytes() == golden.read_bytes()
    assert reread(golden) == Geometry(CODECS[codec], 5, width, 15)


def test_a_file_of_version_1_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write(tmp_path / "t", random_rows(5, 6))
    data = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(data.replace(b'"version":"2"', b'"version":"1"'))
    with pytest.raises(RowStoreError, match="has format version '1', this release reads 2") as refused:
        reread(tmp_path / "t")
    assert refused.value.hint is not None and "quantize and export again" in refused.value.hint


@pytest.mark.parametrize("block", [1, 3, 512 * 53, 512 * 53 + 1, 10**6])
def test_blocks_of_any_size_give_the_same_file(tmp_path: Path, block: int) -> None:
    values = random_rows(512 * 53 * 2 + 11 if block > 100 else 400, 72)  # 53 rows a page, 512 pages a flush
    expected = write(tmp_path / "a", values, "int8-row", block=4096)
    assert write(tmp_path / "b", values, "int8-row", block=block) == expected


def test_offsets_beyond_32_bits() -> None:
    geometry = Geometry(CODECS["int8-row"], 800_000_000, 256, 0)
    header = json.loads(geometry.header[8:])
    assert header["rows"]["data_offsets"] == [0, 53_333_334 * 4096]
    assert geometry.page_rows(53_333_333) == (799_999_995, 800_000_000)


# What a reader must refuse: one case each, and the words that name it.

Header = dict[str, Any]


def meta(**changes: Any) -> Callable[[Header], Header]:
    return lambda header: header | {"__metadata__": header["__metadata__"] | changes}


def without(name: str) -> Callable[[Header], Header]:
    def change(header: Header) -> Header:
        fields = {key: value for key, value in header["__metadata__"].items() if key != name}
        return header | {"__metadata__": fields}

    return change


def tensor(name: str, **changes: Any) -> Callable[[Header], Header]:
    return lambda header: header | {name: header[name] | changes}


HEADERS: dict[str, tuple[Callable[[Header], Header], str]] = {
    "another format": (meta(format="pt"), "has format 'pt'"),
    "a later version": (meta(version="3"), "has format version '3', this release reads 2"),
    "an unknown codec": (meta(codec="int3"), "codec 'int3' is not known"),
    "a later codec": (meta(codec_version="2"), "'int8-row' has version 2"),
    "another codec": (meta(codec="bf16"), "does not follow from its own fields"),
    "no width": (without("width"), "has the fields"),
    "no format": (without("format"), "has no header of a table file"),
    "an unknown field": (meta(note="x"), "has the fields"),
    "a number as field": (meta(width=72), "has the fields"),
    "width zero": (meta(width="0"), "width 0 must lie within"),
    "width negative": (meta(width="-72"), "width '-72', which is not a decimal number"),
    "width too large": (meta(width="5000"), "width 5000 must lie within"),
    "a row larger than a page": (meta(width="4095"), "no row may cross a page"),
    "another width": (meta(width="71"), "does not match its checksum"),
    "rows zero": (meta(rows="0"), "rows 0 must lie within"),
    "rows in another notation": (meta(rows="0100"), "which is not a decimal number"),
    "rows beyond 64 bits": (meta(rows="9" * 30), "which is not a decimal number"),
    "rows beyond the limit": (meta(rows="9" * 18), "must lie within"),
    "more rows": (meta(rows="700"), "does not follow from its own fields"),
    "another layer": (meta(layer="4"), "does not match its checksum"),
    "layer negative": (meta(layer="-1"), "which is not a decimal number"),
    "another dtype": (tensor("rows", dtype="I8"), "does not follow from its own fields"),
    "another shape": (tensor("rows", shape=[1, 8192]), "does not follow from its own fields"),
    "overlapping tensors": (tensor("page_crc32", data_offsets=[0, 8]), "does not follow from its own fields"),
    "a negative offset": (tensor("rows", data_offsets=[-4096, 4096]), "does not follow from its own fields"),
    "a third tensor": (
        lambda header: header | {"x": {"dtype": "U8", "shape": [0], "data_offsets": [8200, 8200]}},
        "does not follow from its own fields",
    ),
    "no metadata": (lambda header: {k: v for k, v in header.items() if k != "__metadata__"}, "has no header"),
    "metadata of another type": (lambda header: header | {"__metadata__": ["format"]}, "has no header"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_refuses_a_header_with(tmp_path: Path, case: str) -> None:
    change, words = HEADERS[case]
    path = tmp_path / "t.safetensors"
    write(path, random_rows(100, 72))
    data = path.read_bytes()
    text = json.dumps(change(json.loads(data[8:4096])), separators=(",", ":")).encode().ljust(4088)
    path.write_bytes(data[:8] + text + data[4096:])
    with pytest.raises(RowStoreError, match=words) as caught:
        reread(path)
    assert str(path) in str(caught.value)


FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "no bytes": (lambda data: b"", "has 0 bytes"),
    "seven bytes": (lambda data: data[:7], "has 7 bytes"),
    "half a header": (lambda data: data[:2000], "states a header of 4088 bytes"),
    "one byte missing": (lambda data: data[:-1], "truncated"),
    "one page missing": (lambda data: data[:-4096], "truncated"),
    "one byte more": (lambda data: data + b"\0", "longer than its header says"),
    "a header of no bytes": (lambda data: bytes(8) + data[8:], "states a header of 0 bytes"),
    "a header beyond the file": (lambda data: (1 << 19).to_bytes(8, "little") + data[8:], "states a header"),
    "a header of 2**64 - 1 bytes": (lambda data: b"\xff" * 8 + data[8:], "states a header of 18446744073709551615"),
    "a header off the boundary": (lambda data: (4087).to_bytes(8, "little") + data[8:], "states a header of 4087"),
    "a header that is not JSON": (lambda data: data.replace(b'"rows":{', b'"rows":[', 1), "has no header"),
    "a header that is not text": (lambda data: data.replace(b"engram-rows", b"engram-row\xff"), "has no header"),
    "a header of a list": (lambda data: data[:8] + b"[]".ljust(4088) + data[4096:], "has no header"),
    "a header nested too deep": (lambda data: data[:8] + b"[" * 4088 + data[4096:], "has no header"),
    "a duplicate key": (lambda data: data.replace(b'"layer":"3"', b'"width":"3"', 1), "has no header"),
    "tabs for padding": (lambda data: data[:4095] + b"\t" + data[4096:], "does not follow from its own fields"),
    "a space before the header": (
        lambda data: data[:8] + b" " + data[8:4095] + data[4096:],
        "does not follow from its own fields",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_refuses_a_file_with(tmp_path: Path, case: str) -> None:
    change, words = FILES[case]
    path = tmp_path / "t.safetensors"
    write(path, random_rows(100, 72))
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before
    with pytest.raises(RowStoreError, match=words):
        reread(path)


def test_refuses_every_flipped_bit_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write(path, random_rows(100, 72))
    data = path.read_bytes()
    end = 8 + len(data[8:4096].rstrip())
    for position in [*range(end + 2), *range(end + 2, 4096, 97)]:
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(RowStoreError):
                reread(path)


def test_writer_refuses_a_row_larger_than_a_page(tmp_path: Path) -> None:
    with pytest.raises(RowStoreError, match="4100 bytes in codec 'f32'; no row may cross a page of 4096 bytes"):
        write(tmp_path / "t", random_rows(2, 1025), "f32")


@pytest.mark.parametrize(("rows", "words"), [(9, "more rows arrive than the 9"), (11, "10 rows arrived of the 11")])
def test_writer_refuses_another_number_of_rows(tmp_path: Path, rows: int, words: str) -> None:
    with pytest.raises(RowStoreError, match=words):
        write_table(tmp_path / "t", [random_rows(10, 4)], rows=rows, width=4, codec=CODECS["f32"], layer=0)
    assert not list(tmp_path.iterdir())


def test_a_value_that_is_not_finite_leaves_no_file(tmp_path: Path) -> None:
    values = random_rows(100, 4)
    values[57, 2] = np.nan
    with pytest.raises(CodecError, match="layer 3: row 57, column 2 is nan"):
        write(tmp_path / "t", values)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write(path, random_rows(10, 4))
    before = path.read_bytes()
    with pytest.raises(RuntimeError), RowWriter(path, 10, 4, CODECS["f32"], 0) as writer:
        writer.append(CODECS["f32"].encode(random_rows(5, 4)))
        raise RuntimeError
    assert path.read_bytes() == before


def test_a_killed_writer_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
import numpy as np
from engram.kernels.codecs import CODECS
from engram.quantize.row_store import write_table
def blocks():
    while True:
        yield np.zeros((1 << 16, 64), np.float32)
        print("block", flush=True)
write_table(Path(sys.argv[1]), blocks(), rows=10**9, width=64, codec=CODECS["f32"], layer=0)
"""
    path = tmp_path / "t"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"block\n"
        child.send_signal(signal.SIGKILL)
    assert not path.exists()
    write(path, random_rows(10, 4))  # what the killed one left does not hinder the next
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("synced", [1, 52, 53, 54, 530, 512 * 53 - 1, 512 * 53, 512 * 53 + 7, 30_000])
@pytest.mark.parametrize("more", [0, 1, 60, 1500])
def test_a_writer_goes_on_where_it_was_synced(tmp_path: Path, synced: int, more: int) -> None:
    """Whatever was appended behind it, on full pages and within one: the same file as without a break."""
    codec, values = CODECS["int8-row"], random_rows(30_011, 72)  # 53 rows a page
    encoded = codec.encode(values)
    expected = write(tmp_path / "whole", values, "int8-row", block=5000)
    path = tmp_path / "t"
    with pytest.raises(OSError), RowWriter(path, len(values), 72, codec, 3, keep=True) as writer:
        writer.append(encoded[: synced // 2])
        writer.sync()
        writer.append(encoded[synced // 2 : synced])
        writer.sync()
        writer.append(encoded[synced : synced + more])
        raise OSError
    assert not path.exists()
    with RowWriter(path, len(values), 72, codec, 3, resume=synced) as writer:
        assert writer.count == synced
        writer.append(encoded[synced:])
    assert writer.table_file == expected
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["t", "whole"]


LEFT: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda path: path.unlink(),
    "no bytes": lambda path: os.truncate(path, 0),
    "a header": lambda path: os.truncate(path, 4096),
    "another header": lambda path: flip(path, 100),
    "a flipped bit": lambda path: flip(path, 4096 + 77),
    "a flipped bit in the last page": lambda path: flip(path, 4096 + 9 * 4096 + 5),
    "another checksum": lambda path: flip(path, 4096 + 567 * 4096 + 3),
}


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 8
    path.write_bytes(data)


@pytest.mark.parametrize("case", LEFT)
def test_a_writer_does_not_go_on_from_what_is_damaged(tmp_path: Path, case: str) -> None:
    codec, values = CODECS["int8-row"], random_rows(30_011, 72)
    encoded = codec.encode(values)
    path = tmp_path / "t"
    with pytest.raises(KeyboardInterrupt), RowWriter(path, len(values), 72, codec, 3, keep=True) as writer:
        writer.append(encoded[:500])
        writer.sync()
        raise KeyboardInterrupt
    LEFT[case](tmp_path / "t.partial")
    with RowWriter(path, len(values), 72, codec, 3, resume=500) as writer:
        assert writer.count == 0
        writer.append(encoded)
    write(tmp_path / "whole", values, "int8-row")
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("resume", [0, 30_012])
def test_a_writer_begins_anew_where_nothing_fits(tmp_path: Path, resume: int) -> None:
    codec, values = CODECS["int8-row"], random_rows(30_011, 72)
    (tmp_path / "t.partial").write_bytes(b"\xff" * 5_000_000)
    with RowWriter(tmp_path / "t", len(values), 72, codec, 3, resume=resume) as writer:
        writer.append(codec.encode(values))
    write(tmp_path / "whole", values, "int8-row")
    assert (tmp_path / "t").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_full_disk_is_reported_by_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails in a thread behind comes out in front, and no file stays."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    codec, values = CODECS["f32"], random_rows(100, 64)
    with pytest.raises(OSError, match="No space left"), RowWriter(tmp_path / "t", 100, 64, codec, 0) as writer:
        monkeypatch.setattr(os, "pwrite", full)
        writer.append(codec.encode(values))
    assert not list(tmp_path.iterdir())
