"""`inspect` and the row report: headers against what was written, and sampled errors against those of all rows."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram import EngramError
from engram.builders.checkpoint import MANIFEST, CheckpointError, open_checkpoint, write_table
from engram.cli import inspect as shown
from engram.kernels.codecs import CodecError, find_codec
from engram.quantize.inspect import inspect
from engram.quantize.package import ExportConfig, PackageError, export_package
from engram.quantize.plan import TablePlan
from engram.quantize.row_report import RowReportError, row_report
from engram.quantize.tables import QuantizeConfig, quantize

REPORT = {"passed": True, "change": {"nll": 0.1}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model"))


def test_every_kind_is_described_by_its_headers(made: Path, tmp_path: Path) -> None:
    layout = open_checkpoint(made).layout
    quantize(QuantizeConfig(made, tmp_path / "judged", tables="nf4"), judge=lambda folder: REPORT)
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
    told = quantize(QuantizeConfig(made, tmp_path / "out"), judge=lambda folder: REPORT | {"passed": False})
    place = Path(told["out"])
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


PART = {"change": {"nll": 0.001, "ci95": [-0.001, 0.002]}, "kl": {"mean": 1e-4, "p99": 2e-3}, "top1": 0.98}
FULL = PART | {
    "tokens": 4096, "documents": 12, "passed": False, "row_error": {"1": 0.01, "3": 0.02},
    "loss": dict.fromkeys(("backbone", "float", "quantized", "zero_table", "shuffled_rows"), 3.25),
    "gain_kept": {"share": 0.97, "ci95": [0.95, 0.99]}, "parts": {"tables": PART}, "max_loss": {"asked": "0.1%",
    "nats": 0.003}, "continuations": PART | {"texts": 16, "tokens": 768, "loss": 3.0},
}  # fmt: skip
PLANS = {
    "layers": {"1": {"first_time_share": 0.25, "classes": [
        {"codec": "nf4", "rows": 30, "bytes": 180, "look_up_share": 0.75},
        {"codec": None, "rows": 10, "bytes": 0, "look_up_share": 0.25},
    ]}},
    "held_out": {"change": 0.5, "ci95": [0.25, 0.75], "tokens": 99, "documents": 9},
    "tried": [{"table_bytes": 180}] * 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def rich(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float checkpoint, a mixed one that its gate refused, and a package, with all that a manifest may say."""
    folder = tmp_path_factory.mktemp("rich")
    layout = open_checkpoint(made).layout
    plan = TablePlan(("nf4", "int8", None), (0, 1, 0, 1), {2: np.arange(5, 400, 7)})
    quantize(QuantizeConfig(made, folder / "q", plans={1: plan, 3: TablePlan.uniform("nf4", layout)}))
    notes = {"quality": FULL, "plans": PLANS, "backbone_quantized": {"type": "int8", "bytes": 1}}
    rewrite(folder / "q", lambda manifest: manifest | notes | {"quality": FULL | {"passed": True}})
    export_package(ExportConfig(folder / "q", folder / "package"))
    rewrite(folder / "q", lambda manifest: manifest | notes)
    rewrite(folder / "package", lambda manifest: manifest | {"origin": manifest["origin"] | notes})
    shutil.copytree(made, folder / "float")
    return {name: folder / name for name in ("float", "q", "package")}


def rewrite(folder: Path, change: Any) -> None:
    manifest = change(json.loads((folder / MANIFEST).read_bytes()))
    (folder / MANIFEST).write_text(json.dumps(manifest))


def said(folder: Path, as_json: bool = False) -> str:
    """What the command prints, to a stream that is UTF-8 to the letter."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(stream):
        shown.inspect(folder, as_json)
        stream.flush()
    return stream.buffer.getvalue().decode()  # type: ignore[attr-defined, no-any-return]


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The way to every field at any depth."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (key,)
            yield from ((key, *rest) for rest in places(value[key]))


JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**63, 10**400, 1e308, math.nan, math.inf, 0.5, "", "0", "mixed", "nf4", "int9",
    "../../../etc/passwd", "tables", "\0", "\x1b[2J\ud800", "x" * 5000, [], {}, [[]], {"": None}, [1, 2], [None, None],
    {"1": {}}, {"layers": {"1": {"classes": [{}]}}}, {"change": {"ci95": [None, None]}}, {"type": "int4"},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["float", "q", "package"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_manifest_with_any_field_deleted_or_of_another_type_is_described_or_refused(
    rich: dict[str, Path], kind: str, data: st.DataObject
) -> None:
    path = rich[kind] / MANIFEST
    good = path.read_bytes()
    manifest = json.loads(good)
    ways = [way for way in places(manifest) if way[:2] not in (("layout", "primes"), ("layout", "multipliers"))]
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from(ways))
        inner = manifest
        with contextlib.suppress(KeyError, IndexError, TypeError):  # the first change took it away
            for key in way:
                inner = inner[key]
            if data.draw(st.booleans()):
                inner[last] = copy.deepcopy(data.draw(st.sampled_from(JUNK)))
            else:
                del inner[last]
    try:
        path.write_text(json.dumps(manifest))
        outcomes = set()
        for as_json in (False, True):
            try:
                text = said(rich[kind], as_json)
                assert "\x1b" not in text and (not as_json or json.loads(text))
                outcomes.add("described")
            except EngramError as wrong:
                assert MANIFEST in str(wrong) or "token_map" in str(wrong)
                outcomes.add(type(wrong))
        assert outcomes in ({"described"}, {CheckpointError})
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize(
    ("way", "value", "words"),
    [
        (["tables", "1"], None, "tables.1 is None, it must be an object"),
        (["tables", "3", "codec"], "int9", "tables.3.codec: row codec 'int9' is not known"),
        (["tables", "3", "codec_version"], 7, "tables.3.codec: .* has version 7"),
        (["tables", "3", "file"], "tables/none.safetensors", "tables/none.safetensors is missing, .* tables.3.file"),
        (["tables", "3", "bytes"], -1, "tables.3.bytes is -1, it must be a whole number from 0"),
        (["tables", "3", "bytes"], 5, r"tables.3.bytes is 5, it must be \d+, the size of"),
        (["tables", "1", "parts", 0, "rows"], 2**70, r"tables.1.parts\[0\].rows is \d+"),
        (["tables", "1", "parts", 0, "rows"], 0, "tables.1.parts is .* it must be classes of"),
        (["layout", "heads"], "2", "layout.heads is '2', it must be a whole number"),
        (["backbone"], [], r"backbone is \[\], it must be an object"),
        (["backbone", "kind"], "moon", "backbone: backbone kind 'moon'"),
        (["quality", "change", "ci95"], [0.1], r"quality.change.ci95 is \[0.1\], it must be two numbers"),
        (["quality", "passed"], "no", "quality.passed is 'no', it must be true or false"),
        (["plans", "layers", "1", "classes", 0, "rows"], "all", r"plans.layers.1.classes\[0\].rows is 'all'"),
    ],
)
def test_a_damaged_field_is_named(rich: dict[str, Path], way: list[Any], value: Any, words: str) -> None:
    good = (rich["q"] / MANIFEST).read_bytes()

    def change(manifest: Any) -> Any:
        inner = manifest
        for key in way[:-1]:
            inner = inner[key]
        inner[way[-1]] = value
        return manifest

    try:
        rewrite(rich["q"], change)
        with pytest.raises(CheckpointError, match=words) as refused:
            inspect(rich["q"])
        assert str(rich["q"] / MANIFEST) in str(refused.value)
    finally:
        (rich["q"] / MANIFEST).write_bytes(good)


def test_the_words_tell_of_verdict_backbone_and_classes(made: Path, rich: dict[str, Path]) -> None:
    weights = (made.parent / "backbone").iterdir()
    size = sum(path.stat().st_size for path in weights if path.suffix in (".safetensors", ".json"))
    plain = said(made)
    assert "rejected" not in plain and f"backbone: float32, {size / 1e3:.1f} kB, at {made.parent}" in plain
    for name in ("q", "package"):
        found = json.loads(said(rich[name], as_json=True))
        assert found["rejected"] is True and found["plans"] == PLANS
        assert (found["backbone"]["type"], found["backbone"]["bytes"]) == ("int8", size)
        words = said(rich[name])
        assert words.splitlines()[0].rstrip().endswith("engram-demo: rejected by its quality gate")
        assert "backbone: int8, computed in float32" in words
        assert "layer 1, nf4: 30 rows (75.00 %), 180 B, 75.00 % of look-ups" in words
        assert "layer 1, dropped: 10 rows (25.00 %), 0 B, 25.00 % of look-ups" in words
        assert "layer 1: of new text about 25.00 % of look-ups find a row not yet read" in words
        assert "on 99 tokens of 9 documents that were not counted the loss changes by +0.500000 nats" in words
        assert "3 plans were tried" in words
        assert "NOT PASSED: the loss grows by at most 0.002000 nats" in words


def test_a_backbone_that_is_elsewhere_has_no_size_here(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "c")
    moved = {"path": str(tmp_path / "gone")}
    rewrite(tmp_path / "c", lambda manifest: manifest | {"backbone": manifest["backbone"] | moved})
    assert "bytes" not in inspect(tmp_path / "c")["backbone"] and "its files are not here" in said(tmp_path / "c")


def test_a_manifest_that_is_nested_too_deeply_is_no_manifest(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is not JSON"):
        inspect(tmp_path)
