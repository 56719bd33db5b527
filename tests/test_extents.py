"""Extent maps: rows of foreign files read in place, bit for bit, and every damage to map or file a named error."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from ways import WAYS, flip

from engram.kernels.codecs import CODECS, Bytes, Codec
from engram.quantize.entries import open_table
from engram.quantize.extent_table import ExtentTable
from engram.quantize.extent_writer import map_extents
from engram.quantize.extents import Source, tensor_source
from engram.quantize.mapped import MappedTable
from engram.quantize.row_store import RowStoreError, write_table
from engram.quantize.row_table import Budget

ROWS = 4000


def open_map(path: Path, io: str, **more: Any) -> ExtentTable:
    try:
        return ExtentTable.open(path, io=io, **more)
    except RowStoreError as error:
        if io == "uring" and "cannot be used here" in str(error):
            pytest.skip(str(error))
        raise


def check(table: ExtentTable, encoded_NK: Bytes, codec: Codec, width: int) -> None:
    """Gather, decode, blocks: all rows and random ones with repeats."""
    for rows in (np.arange(ROWS), np.random.default_rng(0).integers(0, ROWS, 3001), np.array([ROWS - 1, 0, 0])):
        poisoned = np.full((len(rows), encoded_NK.shape[1]), 0xAA, dtype=np.uint8)
        assert np.array_equal(table.gather(rows, poisoned), encoded_NK[rows])
        out = np.full((len(rows), width), np.nan, dtype=np.float32)
        expected = codec.decode(encoded_NK[rows], width)
        for threads in (1, 0):
            out[...] = np.nan
            table.decode(rows, out, threads=threads)
            assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))
    assert table.gather(np.arange(0)).shape == (0, encoded_NK.shape[1])
    assert np.array_equal(np.concatenate([block for _, block in table.blocks()]), encoded_NK)


def shards(folder: Path) -> tuple[Path, Bytes]:
    """FP8 values and their scales in two tensors, each over two shards, as V4.1 publishes them; and its map."""
    rng = np.random.default_rng(1)
    codec = CODECS["fp8-e8m0"]
    encoded = codec.encode(rng.standard_normal((ROWS, 256)).astype(np.float32))
    parts: list[list[Source]] = [[], []]
    for i, (begin, end) in enumerate([(0, 1500), (1500, ROWS)]):
        path = folder / f"shard-{i}.safetensors"
        other = rng.integers(0, 255, 77 + i, dtype=np.uint8)  # rows begin anywhere in a page
        tensors = {"a": other, "v": encoded[begin:end, :256].copy(), "w": encoded[begin:end, 256:].copy()}
        save_file(tensors, path)
        for part, name in zip(parts, "vw", strict=True):
            part.append(tensor_source(path, name))
    path = folder / "layer-01.extents.safetensors"
    found = map_extents(path, parts, codec, rows=ROWS, width=256, layer=1)
    assert (found["files"], found["extents"]) == (2, 4) and found["bytes"] == path.stat().st_size
    return path, encoded


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("verify", ["first-touch", "open", "off"])
def test_rows_in_two_tensors_over_two_shards(tmp_path: Path, verify: str, io: str) -> None:
    path, encoded = shards(tmp_path)
    with open_map(path, io, verify=verify, codec="fp8-e8m0", rows=ROWS, width=256, layer=1) as table:
        assert table.io == io and len(table.paths) == 3
        check(table, encoded, CODECS["fp8-e8m0"], 256)


@pytest.mark.parametrize("io", WAYS)
def test_float_rows_of_a_checkpoint_in_place(tmp_path: Path, io: str) -> None:
    values = np.random.default_rng(2).standard_normal((ROWS, 40)).astype(np.float32)
    save_file({"rows": values}, tmp_path / "table.safetensors")
    path, codec = tmp_path / "layer-00.extents.safetensors", CODECS["f32"]
    source = tensor_source(tmp_path / "table.safetensors", "rows")
    map_extents(path, [[source]], codec, rows=ROWS, width=40, layer=0)
    with open_map(path, io) as table:
        check(table, values.view(np.uint8), codec, 40)


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("width", [160, 256])
def test_q8_0_rows_inside_a_gguf_file(tmp_path: Path, width: int, io: str) -> None:
    values = np.random.default_rng(3).standard_normal((ROWS, width)).astype(np.float32)
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "test")
    writer.add_tensor("other", np.arange(33, dtype=np.float32))
    writer.add_tensor("rows", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = next(t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "rows")
    size = blocks.shape[1]
    path, codec = tmp_path / "layer-00.extents.safetensors", CODECS["q8_0"]
    source = Source(tmp_path / "model.gguf", int(tensor.data_offset), size, size, ROWS)
    map_extents(path, [[source]], codec, rows=ROWS, width=width, layer=0)
    with open_map(path, io) as table:
        check(table, blocks, codec, width)
        out = table.decode(np.arange(ROWS), np.full((ROWS, width), np.nan, np.float32))
        assert np.array_equal(out, gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("stride", [264, 300, 5000])
def test_rows_with_gaps_and_an_end_within_a_block(tmp_path: Path, stride: int, io: str) -> None:
    encoded = np.random.default_rng(4).integers(0, 256, (ROWS, 264), dtype=np.uint8)
    content = np.random.default_rng(5).integers(0, 256, (ROWS, stride), dtype=np.uint8)
    content[:, :264] = encoded
    (tmp_path / "raw").write_bytes(b"x" * 4095 + content.tobytes()[: (ROWS - 1) * stride + 264])
    path, codec = tmp_path / "layer-00.extents.safetensors", CODECS["fp8-e8m0"]
    map_extents(path, [[Source(tmp_path / "raw", 4095, stride, 264, ROWS)]], codec, rows=ROWS, width=256, layer=0)
    with open_map(path, io) as table:
        Budget(8 << 20).adopt(table)
        check(table, encoded, codec, 256)


def test_the_map_moves_with_its_files_and_is_the_same_every_time(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path, encoded = shards(tmp_path / "a")
    first = path.read_bytes()
    assert b"a/shard" not in first and shards(tmp_path / "a")[0].read_bytes() == first
    (tmp_path / "a").rename(tmp_path / "b")
    with ExtentTable.open(tmp_path / "b" / path.name) as table:
        assert np.array_equal(table.gather(np.arange(ROWS)), encoded)
    elsewhere = tmp_path / "layer-02.extents.safetensors"
    source = tensor_source(tmp_path / "b" / "shard-0.safetensors", "v")
    map_extents(elsewhere, [[source._replace(path=source.path)]], CODECS["int8-row"], rows=1500, width=252, layer=2)
    with open_table(elsewhere) as opened:
        assert isinstance(opened, ExtentTable) and opened.paths[0] == tmp_path / "b" / "shard-0.safetensors"
    write_table(tmp_path / "table", [np.zeros((3, 4), np.float32)], rows=3, width=4, codec=CODECS["f32"], layer=0)
    with open_table(tmp_path / "table") as opened:
        assert isinstance(opened, MappedTable)


@pytest.mark.parametrize("io", WAYS)
def test_a_flipped_bit_in_a_foreign_file_is_named(tmp_path: Path, io: str) -> None:
    path, encoded = shards(tmp_path)
    shard = tmp_path / "shard-1.safetensors"
    source = tensor_source(shard, "v")
    position = source.offset + 256 * 1000
    flip(shard, position)
    block = position // 4096
    touched = [i for i in range(2500) if block * 4096 - 256 < source.offset + 256 * i < block * 4096 + 4096]
    words = re.escape(
        f"table file {shard} (layer 1) is damaged: page {block}, rows {1500 + touched[0]} to {1500 + touched[-1]}, "
        f"does not match its checksum in the extent map {path}"
    )
    others = np.setdiff1d(np.arange(ROWS), 1500 + np.array(touched))
    with open_map(path, io) as table:
        assert np.array_equal(table.gather(others), encoded[others])
        for row in (touched[0], 1000, touched[-1]):
            with pytest.raises(RowStoreError, match=words):
                table.gather(np.array([0, 1500 + row]))
        with pytest.raises(RowStoreError, match=words):
            list(table.blocks())
    with pytest.raises(RowStoreError, match=words):
        ExtentTable.open(path, verify="open", io=io)


def test_a_flipped_bit_anywhere_in_the_map_is_found(tmp_path: Path) -> None:
    path, _ = shards(tmp_path)
    content = path.read_bytes()
    head = 8 + int.from_bytes(content[:8], "little") + 4 * 48
    for position in [*range(head), len(content) - 1]:
        flip(path, position, bit=position % 8)
        with pytest.raises(RowStoreError, match=f"extent map {path}|table file .* cannot be opened"):
            ExtentTable.open(path)
        flip(path, position, bit=position % 8)
    flip(path, head + 4 * 3)
    with ExtentTable.open(path) as table, pytest.raises(RowStoreError, match="does not match its checksum in the ext"):
        table.gather(np.arange(ROWS))
    for size in (0, 7, 100, head, len(content) - 1, len(content) + 1):
        path.write_bytes(content)
        os.truncate(path, size)
        with pytest.raises(RowStoreError, match=f"extent map {path}"):
            ExtentTable.open(path)


@pytest.mark.parametrize("io", WAYS)
def test_a_foreign_file_of_another_size_is_refused(tmp_path: Path, io: str) -> None:
    path, encoded = shards(tmp_path)
    shard = tmp_path / "shard-1.safetensors"
    whole = shard.read_bytes()
    for size in (0, 5000, len(whole) - 1, len(whole) + 1):
        with open_map(path, io) as table:
            table.gather(np.arange(100))
            ticket = table.ask(np.arange(ROWS))
            os.truncate(shard, size)
            with pytest.raises(RowStoreError, match=f"{shard} .* has {size} bytes, it had {len(whole)}"):
                table.take(ticket, np.full((ROWS, 256), np.nan, np.float32))
        with pytest.raises(RowStoreError, match=f"{shard} has {size} bytes, the extent map .* says {len(whole)}"):
            ExtentTable.open(path, io=io)
        shard.write_bytes(whole)
    with open_map(path, io) as table:
        shard.unlink()
        assert np.array_equal(table.gather(np.arange(ROWS)), encoded)
    with pytest.raises(RowStoreError, match=f"{shard} cannot be opened: No such file"):
        ExtentTable.open(path, io=io)


def test_sources_that_make_no_table_are_refused(tmp_path: Path) -> None:
    shards(tmp_path)
    path, out, codec = tmp_path / "shard-0.safetensors", tmp_path / "x.extents.safetensors", CODECS["fp8-e8m0"]
    values, scales = tensor_source(path, "v"), tensor_source(path, "w")
    for parts, words in (
        ([[values]], "do not make a row of 264 bytes"),
        ([[values], [scales._replace(rows=1499)]], "part 1 has 1499 rows, the table 1500"),
        ([[values], [scales._replace(stride=7)]], "part 1 has an extent that cannot be"),
        ([[values._replace(rows=1501)], [scales]], "part 0 has 1501 rows"),
        ([[values._replace(offset=1 << 30)], [scales]], "part 0 reaches beyond the end"),
        ([[values, scales], [scales]], "has rows of 8 bytes"),
        ([[values._replace(path=tmp_path / "none")], [scales]], "cannot be read: No such file"),
    ):
        with pytest.raises(RowStoreError, match=words):
            map_extents(out, parts, codec, rows=1500, width=256, layer=0)
    for name, file in (("none", path), ("v", tmp_path / "none"), ("v", out)):
        out.write_bytes(b"\0" * 100)
        with pytest.raises(RowStoreError, match="no safetensors file with rows|cannot be read"):
            tensor_source(file, name)
    with pytest.raises(RowStoreError, match="has layer 1, expected 2"):
        ExtentTable.open(tmp_path / "layer-01.extents.safetensors", layer=2)
