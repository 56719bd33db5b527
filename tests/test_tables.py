"""Quantizing: the rows that come out, the errors reported, what is copied, and that a kill leaves nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from float_tables import WIDTH, Recorder, checkpoint, run_child
from widths import fitting

from engram.builders.backbone import BackboneRef
from engram.builders.checkpoint import CheckpointError, save_checkpoint
from engram.builders.layout import Layout
from engram.kernels.codecs import CODECS, CodecError
from engram.quantize.mapped import MappedTable
from engram.quantize.stream import FloatRows, RowErrors, StreamError
from engram.quantize.tables import QuantizeConfig, QuantizeError, quantize


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_tables_hold_what_the_codec_makes_of_each_row(tmp_path: Path, codec: str) -> None:
    width, name = fitting(codec, WIDTH), CODECS[codec].name  # with the factor, where it has one
    tables = checkpoint(tmp_path / "float", width=width)
    recorder = Recorder()
    report = quantize(QuantizeConfig(tmp_path / "float", tmp_path / "out", tables=name), recorder)
    assert report["backbone"] == "unchanged"
    manifest = json.loads((tmp_path / "out" / "engram.json").read_bytes())
    for n, rows in tables.items():
        path = tmp_path / "out" / f"tables/layer-0{n}.safetensors"
        encoded = CODECS[codec].encode(rows)
        with MappedTable.open(path, codec=name, rows=len(rows), width=width, layer=n) as table:
            assert np.array_equal(table.gather(np.arange(len(rows))), encoded)
            assert manifest["tables"][str(n)]["seal"] == table.seal()
        said = report["tables"][str(n)]
        lost = CODECS[codec].decode(encoded, width).astype(np.float64) - rows
        by_row = np.linalg.norm(lost, axis=1) / np.linalg.norm(rows.astype(np.float64), axis=1)
        assert said["rel_error"] == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(rows), rel=1e-6)
        assert said["worst_row"] == by_row.argmax()
        assert said["worst_row_error"] == pytest.approx(by_row.max(), rel=1e-6)
        assert (said["codec"], said["bytes"]) == (name, path.stat().st_size)
        assert said["bytes_before"] == (tmp_path / "float" / f"tables/layer-0{n}.safetensors").stat().st_size
        assert recorder.done[f"layer {n} to {name}"] == len(rows)
    assert manifest["tables"]["1"]["codec"] == name and manifest["tables"]["1"]["codec_version"] == 1


def test_everything_else_is_copied_but_the_training_state(tmp_path: Path) -> None:
    checkpoint(tmp_path / "float")
    quantize(QuantizeConfig(tmp_path / "float", tmp_path / "out"))
    same = ["layers.safetensors", "token_map.safetensors", "tokenizer.json", "tokenizer_info.json"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*same, "engram.json", "tables"])
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "float" / n).read_bytes() for n in same)
    before, after = (json.loads((tmp_path / name / "engram.json").read_bytes()) for name in ("float", "out"))
    assert after["format"] == "engram-quantized"
    assert {key for key in before if before[key] != after.get(key)} == {"format", "tables"}
    assert not list(tmp_path.glob("*.partial"))


def test_errors_of_zero_rows_and_of_blocks() -> None:
    rows = np.array([[0, 0], [3, 4], [0, 1], [10, 0]], dtype=np.float32)
    back = np.array([[0, 0], [3, 3], [0, 0.5], [10, 0]], dtype=np.float32)
    errors = RowErrors()
    lost, whole = np.square(rows - back).sum(1, dtype=np.float64), np.square(rows).sum(1, dtype=np.float64)
    errors.add(lost[:1], whole[:1])
    errors.add(lost[1:], whole[1:])
    assert (errors.worst_row, errors.worst_row_error) == (2, 0.5)
    assert errors.rel_error == pytest.approx((1.25 / 126) ** 0.5)
    nothing = RowErrors()
    nothing.add(lost[:1], whole[:1])
    assert (nothing.worst_row, nothing.rel_error) == (0, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_named_and_leaves_nothing(tmp_path: Path, bad: float) -> None:
    tables = checkpoint(tmp_path / "float")
    tables[5][321, 4] = bad
    checkpoint(tmp_path / "bad", tables=tables)
    with pytest.raises(CodecError, match=f"layer 5: row 321, column 4 is {bad}"):
        quantize(QuantizeConfig(tmp_path / "bad", tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_an_odd_width_is_refused_by_nf4_before_any_work(tmp_path: Path) -> None:
    checkpoint(tmp_path / "float", width=7)
    with pytest.raises(CodecError, match="row width 7 must be even"):
        quantize(QuantizeConfig(tmp_path / "float", tmp_path / "out", tables="nf4"))
    assert not list(tmp_path.glob("out*"))


def test_an_unknown_codec_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CodecError, match="'int2' is not known"):
        quantize(QuantizeConfig(tmp_path / "none", tmp_path / "out", tables="int2"))


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    checkpoint(tmp_path / "float")
    quantize(QuantizeConfig(tmp_path / "float", tmp_path / "out"))
    with pytest.raises(CheckpointError, match="has format 'engram-quantized', expected 'engram-checkpoint'"):
        quantize(QuantizeConfig(tmp_path / "out", tmp_path / "again"))


def target(case: str, folder: Path) -> tuple[Path, bool]:
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("irreplaceable")
    return {
        "an existing folder": (folder / "mine", False),
        "a folder that is not ours, by force": (folder / "mine", True),
        "a file, by force": (folder / "mine" / "thesis.txt", True),
        "the source itself": (folder / "float", True),
        "a folder in the source": (folder / "float" / "new", False),
        "the folder of the source": (folder, True),
    }[case]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("an existing folder", "exists"),
        ("a folder that is not ours, by force", "is not an engram folder, --force does not replace it"),
        ("a file, by force", "is not an engram folder"),
        ("the source itself", "lie in one another"),
        ("a folder in the source", "lie in one another"),
        ("the folder of the source", "lie in one another"),
    ],
)
def test_refuses_to_write_over(tmp_path: Path, case: str, words: str) -> None:
    checkpoint(tmp_path / "float")
    out, force = target(case, tmp_path)
    with pytest.raises(QuantizeError, match=words):
        quantize(QuantizeConfig(tmp_path / "float", out, force=force))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "irreplaceable"
    assert (tmp_path / "float" / "engram.json").is_file()


def test_force_replaces_an_earlier_result(tmp_path: Path) -> None:
    checkpoint(tmp_path / "float")
    quantize(QuantizeConfig(tmp_path / "float", tmp_path / "out", tables="f32"))
    quantize(QuantizeConfig(tmp_path / "float", tmp_path / "out", tables="nf4", force=True))
    MappedTable.open(tmp_path / "out" / "tables" / "layer-01.safetensors", codec="nf4").close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "out", "tokenizer"]


def test_a_table_that_shrinks_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path / "float")
    rows = FloatRows(tmp_path / "float" / "tables" / "layer-01.safetensors", 4096, 300, WIDTH)
    os.truncate(rows.path, 4096 + 32 * 120 + 4)
    with pytest.raises(StreamError, match=r"layer-01.safetensors ends within row 120 of 300"):
        list(rows.blocks(50))


@pytest.mark.parametrize("count", [1, 7, 100, 300, 1000])
@pytest.mark.parametrize("first", [0, 130, 299, 300])
def test_blocks_read_ahead_are_the_rows_in_order(tmp_path: Path, count: int, first: int) -> None:
    values = np.arange(300 * 3, dtype="<f4").reshape(300, 3)
    (tmp_path / "t").write_bytes(b"four" + values.tobytes())
    found = [block.copy() for block in FloatRows(tmp_path / "t", 4, 300, 3).blocks(count, first)]
    assert all(len(block) == count for block in found[:-1])
    assert np.array_equal(np.concatenate([*found, values[:0]]), values[first:])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's accounting of resident memory")
def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    """Peak resident memory, mapped file pages included, grows by less than a third of the table's 256 MB."""
    rows = 1_000_000
    layout = Layout.build(
        dialect="demo", orders=(2,), heads=1, head_dim=64, layers=(0,), rows_per_head=rows, pad_id=0, vocab_size=9
    )
    ones = {0: np.broadcast_to(np.float32(1), (layout.table_rows[0], 64))}
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    save_checkpoint(
        tmp_path / "float", layout=layout, gates={0: {}}, dense={0: {}}, tables=ones,
        backbone=BackboneRef("hf", "some/model"), tokenizer_folder=tokenizer,
    )  # fmt: skip
    code = """
import sys
from pathlib import Path
from engram.quantize.tables import QuantizeConfig, quantize
def peak():  # unlike getrusage, not inherited from the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
quantize(QuantizeConfig(Path(sys.argv[1]), Path(sys.argv[2])))
print(peak() - before)
"""
    with run_child(code, tmp_path / "float", tmp_path / "out") as child:
        assert child.stdout is not None
        grown = int(child.stdout.read()) * 1024
    assert grown < 64 << 20 < 4 * 64 * rows / 3


def test_needs_no_torch(tmp_path: Path) -> None:
    checkpoint(tmp_path / "float")
    code = """
import sys
from pathlib import Path
from engram.quantize.package import ExportConfig, export_package, open_package
from engram.quantize.verify import verify_package
from engram.quantize.tables import QuantizeConfig, quantize
from engram.runtime.reader import RowReader
import numpy as np
quantize(QuantizeConfig(Path(sys.argv[1]), Path(sys.argv[2])))
export_package(ExportConfig(Path(sys.argv[2]), Path(sys.argv[3]), embed_backbone=False))
assert verify_package(Path(sys.argv[3]))["ok"]
package = open_package(Path(sys.argv[3]))
reader = RowReader(package)
reader.take(reader.ask(package.layout.rows(np.array([[1, 2, 3]]))), 1)
print("torch" in sys.modules)
"""
    with run_child(code, tmp_path / "float", tmp_path / "q", tmp_path / "p") as child:
        assert child.stdout is not None and child.stdout.read() == b"False\n"
