"""`inspect` and the row report: headers against what was written, and sampled errors against those of all rows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tiny

from engram.builders.checkpoint import CheckpointError, open_checkpoint, write_table
from engram.kernels.codecs import CodecError, find_codec
from engram.quantize.inspect import inspect
from engram.quantize.package import ExportConfig, PackageError, export_package
from engram.quantize.row_report import RowReportError, row_report
from engram.quantize.tables import QuantizeConfig, quantize
from engram.runtime.quality_gate import settle

REPORT = {"passed": True, "change": {"nll": 0.1}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model"))


def test_every_kind_is_described_by_its_headers(made: Path, tmp_path: Path) -> None:
    layout = open_checkpoint(made).layout
    quantize(QuantizeConfig(made, tmp_path / "q", tables="nf4"))
    settle(tmp_path / "q", tmp_path / "judged", REPORT)
    export_package(ExportConfig(tmp_path / "judged", tmp_path / "package"))
    for folder, kind, codec, row_bytes in (
        (made, "float checkpoint", "f32", 32), (tmp_path / "judged", "quantized checkpoint", "nf4", 6),
        (tmp_path / "package", "package", "nf4", 6),
    ):  # fmt: skip
        found = inspect(folder)
        assert (found["kind"], found["family"], found["rows_per_token"]) == (kind, "engram-demo", 8)
        assert found["bytes_per_token"] == 8 * row_bytes
        for layer in found["layers"]:
            path = folder / f"tables/layer-0{layer['layer']}.safetensors"
            assert layer["rows"] == layout.table_rows[layer["layer"]] and layer["dtype"] == codec
            assert layer["bytes"] == path.stat().st_size
        assert found.get("quality") == (None if folder == made else REPORT)


def test_what_its_gate_refused_is_not_exported(made: Path, tmp_path: Path) -> None:
    quantize(QuantizeConfig(made, tmp_path / "q"))
    place = settle(tmp_path / "q", tmp_path / "out", REPORT | {"passed": False})
    with pytest.raises(PackageError, match=r"out\.rejected did not pass its quality gate"):
        export_package(ExportConfig(place, tmp_path / "package"))
    assert inspect(place)["quality"]["passed"] is False and not (tmp_path / "package").exists()


def test_a_folder_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no engram.json"):
        inspect(tmp_path)


def test_intervals_of_sampled_errors_hold_the_error_of_all_rows(made: Path) -> None:
    checkpoint = open_checkpoint(made)
    truth = {}
    for layer in checkpoint.layout.layers:
        rows = np.asarray(checkpoint.table(layer))
        back = find_codec("nf4").decode(find_codec("nf4").encode(rows), 8).astype(np.float64)
        truth[str(layer)] = math.sqrt(np.square(back - rows).sum() / np.square(rows.astype(np.float64)).sum())
    inside = 0
    for seed in range(40):
        for layer, figures in row_report(made, ["nf4", "int8"], 300, seed=seed)["layers"].items():
            low, high = figures["codecs"]["nf4"]["ci95"]
            inside += low <= truth[layer] <= high
            assert figures["codecs"]["int8"]["rel_error"] < figures["codecs"]["nf4"]["rel_error"] / 5
            assert figures["codecs"]["nf4"]["worst_row"] >= figures["codecs"]["nf4"]["p99_row"]
    assert 70 <= inside <= 80


def test_a_stored_table_is_sampled_against_what_it_stores(made: Path, tmp_path: Path) -> None:
    quantize(QuantizeConfig(made, tmp_path / "q", tables="nf4"))
    found = row_report(tmp_path / "q", ["f32", "nf4"], 200)["layers"]["1"]
    assert found["stored_as"] == "nf4" and found["codecs"]["f32"]["rel_error"] == 0
    assert found["codecs"]["nf4"]["rel_error"] < 2e-3, "nf4 of nf4 changes the scales' rounding at most"


def test_a_row_that_cannot_be_encoded_is_named_by_its_place_in_the_table(tmp_path: Path) -> None:
    made = tiny.write_checkpoint(tmp_path, layers=(1,))
    checkpoint = open_checkpoint(made)
    bad = 500
    rows = np.array(checkpoint.table(1))
    rows[bad, 3] = np.inf
    write_table(made / "tables" / "layer-01.safetensors", rows)
    for codec in ("int8", "nf4"):
        with pytest.raises(CodecError, match=f"layer 1: row {bad}, column 3 is inf"):
            row_report(made, [codec], 4000)


def test_a_sample_that_says_nothing_is_refused(made: Path) -> None:
    with pytest.raises(RowReportError, match="99 rows says nothing"):
        row_report(made, ["nf4"], 99)
    with pytest.raises(CodecError, match="'int1' is not known"):
        row_report(made, ["int1"], 100)
