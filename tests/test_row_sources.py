"""Rows of a float table, read by offset: the same bits as its mapping, in bounded memory."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from engram.builders.checkpoint import Checkpoint, CheckpointError, open_checkpoint, table_file
from engram.builders.layout import Layout
from engram.builders.process_memory import resident_bytes
from engram.kernels.codecs import CodecError
from engram.quantize.plan import TablePlan
from engram.runtime.row_sources import FloatTables, PlannedRows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny.write_checkpoint(tmp_path_factory.mktemp("model"), layers=(1, 3)))


def test_rows_are_those_of_the_mapping(checkpoint: Checkpoint) -> None:
    source, generator = FloatTables(checkpoint), np.random.default_rng(0)
    for layer in (1, 3):
        truth, count = checkpoint.table(layer), checkpoint.layout.table_rows[layer]
        wanted: list[Any] = [
            generator.integers(0, count, size=500), np.arange(count), np.arange(count)[::-1], [count - 1],
            [0, 0, 2, 1, 0],
        ]  # fmt: skip
        for rows in wanted:
            found = source.rows(layer, np.array(rows, dtype=np.int64))
            assert found.dtype == np.float32 and np.array_equal(found, truth[rows])
        assert source.rows(layer, np.empty(0, np.int64)).shape == (0, 8)
        rows_BTC = generator.integers(0, count, size=(2, 5, 4))
        assert np.array_equal(source(layer, rows_BTC), truth[rows_BTC].reshape(2, 5, 32))


def test_what_was_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    """Every tenth row of a table of 512 MiB; the mapping keeps most of it, and shows that the measure sees it."""
    layout = Layout.build(
        dialect="demo", orders=(2, 3), heads=2, head_dim=64, layers=(1,), rows_per_head=524_287, pad_id=2,
        vocab_size=40, token_map=np.arange(40),
    )  # fmt: skip
    rows = layout.table_rows[1]
    header = json.dumps({"rows": {"dtype": "F32", "shape": [rows, 64], "data_offsets": [0, rows * 256]}}).encode()
    header += b" " * (4096 - 8 - len(header))
    path = tmp_path / table_file(1)
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(4096 + rows * 256)  # a hole: no disk, but pages like any other
    made = Checkpoint(tmp_path, {}, layout, None)  # type: ignore[arg-type]
    wanted = np.arange(0, rows, 10)
    assert path.stat().st_size > 500 << 20
    source = FloatTables(made)
    source.rows(1, wanted[:10])
    before = resident_bytes()
    for begin in range(0, len(wanted), 1 << 14):
        assert not source.rows(1, wanted[begin : begin + (1 << 14)]).any()
    after = resident_bytes()
    assert after["rss_file_bytes"] - before["rss_file_bytes"] < 16 << 20
    assert after["rss_bytes"] - before["rss_bytes"] < 48 << 20
    mapped = made.table(1)
    assert not mapped[wanted].any()
    assert resident_bytes()["rss_file_bytes"] - after["rss_file_bytes"] > 256 << 20


def test_a_table_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    made = open_checkpoint(tiny.write_checkpoint(tmp_path, layers=(1,)))
    source, path = FloatTables(made), made.folder / table_file(1)
    os.truncate(path, path.stat().st_size - 20)
    last = made.layout.table_rows[1] - 1
    assert source.rows(1, np.array([last - 1])).shape == (1, 8)
    with pytest.raises(CheckpointError, match=r"layer-01.safetensors ends at byte \d+, .* truncated"):
        source.rows(1, np.array([last]))


def test_files_are_closed_with_their_source(checkpoint: Checkpoint) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    source = FloatTables(checkpoint)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    del source
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_error_names_the_row_of_the_table(tmp_path: Path) -> None:
    made = open_checkpoint(tiny.write_checkpoint(tmp_path, layers=(1,)))
    bad = 300
    with (made.folder / table_file(1)).open("r+b") as file:
        file.seek(-4 * 8 * (made.layout.table_rows[1] - bad), os.SEEK_END)
        file.write(np.array([np.nan], "<f4").tobytes())
    planned = PlannedRows(FloatTables(made), made.layout, {1: TablePlan.uniform("int8", made.layout)})
    with pytest.raises(CodecError, match=f"layer 1: row {bad}, column 0 is nan"):
        planned(1, np.array([[[7, 200, bad, 301]]]))
