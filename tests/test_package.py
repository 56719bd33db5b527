"""Packages: written whole or not at all, opened only when sound; one case for each way to be wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram.builders.backbone import BackboneError, BackboneRef
from engram.builders.checkpoint import CheckpointError, save_checkpoint
from engram.builders.fetch import hash_file
from engram.builders.layout import Layout
from engram.kernels.codecs import CODECS, Floats
from engram.quantize.extent_writer import map_extents
from engram.quantize.extents import Source
from engram.quantize.package import ExportConfig, PackageError, export_package, open_package
from engram.quantize.row_store import RowStoreError, write_table
from engram.quantize.tables import QuantizeConfig, quantize
from engram.quantize.verify import verify_package

WIDTH = 8
SEED = {"big": b"\1" * (2 << 20)}


def layout() -> Layout:
    return Layout.build(
        dialect="demo", orders=(2, 3), heads=2, head_dim=WIDTH, layers=(1, 5), rows_per_head=300, pad_id=2,
        vocab_size=40, token_map=np.arange(40) // 2,
    )  # fmt: skip


def backbone_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 3}')
    (folder / "model.safetensors").write_bytes(SEED["big"])
    (folder / "README.md").write_text("not part of the reference")
    return folder


def checkpoint(folder: Path, backbone: BackboneRef | None = None) -> dict[int, Floats]:
    """folder/float, folder/quantized and folder/backbone; the float tables."""
    made = layout()
    generator = np.random.default_rng(0)
    rows = {n: generator.normal(size=(made.table_rows[n], WIDTH)).astype(np.float32) for n in made.layers}
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text('{"made": "up"}')
    source = backbone_folder(folder / "backbone")
    save_checkpoint(
        folder / "float", layout=made, gates={n: {"hidden": 3} for n in made.layers},
        dense={n: {"value_proj.weight": np.full((3, 16), n, np.float32)} for n in made.layers}, tables=rows,
        backbone=backbone or BackboneRef.find(str(source)), tokenizer_folder=folder / "tokenizer",
        extra={"trained": {"steps": 3}}, state={"optimizer.json": b"{}"},
    )  # fmt: skip
    quantize(QuantizeConfig(folder / "float", folder / "quantized", tables="nf4"))
    return rows


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A sound package of nf4 tables with its backbone embedded."""
    checkpoint(tmp_path)
    export_package(ExportConfig(tmp_path / "quantized", tmp_path / "package"))
    return tmp_path / "package"


def every_row(folder: Path) -> dict[int, Floats]:
    with open_package(folder) as opened:
        return {n: table.codec.decode(table.gather(np.arange(table.rows)), WIDTH) for n, table in opened.layers.items()}


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hash_file(path) for path in folder.rglob("*") if path.is_file()}


# What is written


def test_a_float_checkpoint_keeps_its_bits(tmp_path: Path) -> None:
    rows = checkpoint(tmp_path)
    export_package(ExportConfig(tmp_path / "float", tmp_path / "package"))
    for n, decoded in every_row(tmp_path / "package").items():
        assert decoded.tobytes() == rows[n].tobytes()
    assert json.loads((tmp_path / "package" / "engram.json").read_bytes())["tables"]["5"]["codec"] == "f32"


def test_a_quantized_checkpoint_keeps_its_table_files(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    report = export_package(ExportConfig(tmp_path / "quantized", tmp_path / "package"))
    before, after = contents(tmp_path / "quantized"), contents(tmp_path / "package")
    assert set(after) == {
        "engram.json", "layers.safetensors", "token_map.safetensors", "tokenizer.json", "tables/layer-01.safetensors",
        "tables/layer-05.safetensors", "backbone/config.json", "backbone/model.safetensors",
    }  # fmt: skip
    assert {name for name in after if before.get(name) != after[name]} == {
        "engram.json", "backbone/config.json", "backbone/model.safetensors",
    }  # fmt: skip
    assert report["files"] == len(after)
    assert report["bytes"] == sum(path.stat().st_size for path in (tmp_path / "package").rglob("*") if path.is_file())
    assert not list(tmp_path.glob("*.partial"))


def test_an_opened_package_has_what_a_runtime_needs(package: Path) -> None:
    with open_package(package) as opened:
        assert opened.layout.to_json() == layout().to_json()
        assert opened.layout.token_map is not None and opened.layout.token_map.tolist() == [i // 2 for i in range(40)]
        assert opened.gates() == {1: {"hidden": 3}, 5: {"hidden": 3}}
        assert opened.dense()[5]["value_proj.weight"].tolist() == [[5.0] * 16] * 3
        assert opened.manifest["origin"] == {"trained": {"steps": 3}}
        assert opened.backbone == BackboneRef(
            "embedded", "backbone", "float32",
            {n: hashlib.sha256(SEED["big"] if n[0] == "m" else b'{"hidden_size": 3}').hexdigest()
             for n in ("config.json", "model.safetensors")},
        )  # fmt: skip
        opened.backbone.verify(package)


def test_a_package_of_a_package_is_the_same_package(package: Path, tmp_path: Path) -> None:
    export_package(ExportConfig(package, tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(package)


def test_an_embedded_backbone_is_a_copy(package: Path, tmp_path: Path) -> None:
    source = tmp_path / "backbone" / "model.safetensors"
    assert source.stat().st_ino != (package / "backbone" / "model.safetensors").stat().st_ino
    source.write_bytes(b"edited")
    assert verify_package(package)["ok"]


def test_a_gguf_backbone_is_embedded_as_model_gguf(tmp_path: Path) -> None:
    (tmp_path / "some-Q4_1.gguf").write_bytes(b"GGUF")
    checkpoint(tmp_path, BackboneRef.find(str(tmp_path / "some-Q4_1.gguf")))
    export_package(ExportConfig(tmp_path / "float", tmp_path / "package"))
    with open_package(tmp_path / "package") as opened:
        assert list(opened.backbone.sha256) == ["model.gguf"]
    assert (tmp_path / "package" / "backbone" / "model.gguf").read_bytes() == b"GGUF"


def test_a_backbone_by_reference_is_named_with_its_hashes(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    export_package(ExportConfig(tmp_path / "quantized", tmp_path / "package", embed_backbone=False))
    assert not (tmp_path / "package" / "backbone").exists()
    with open_package(tmp_path / "package") as opened:
        assert opened.backbone == BackboneRef.find(str(tmp_path / "backbone"))
    assert verify_package(tmp_path / "package")["ok"]
    (tmp_path / "backbone" / "config.json").write_text("{}")
    assert re.search("backbone file .*config.json has SHA-256", verify_package(tmp_path / "package")["problems"][0])


def test_a_trained_backbone_beside_the_checkpoint_travels_or_is_named_in_full(package: Path, tmp_path: Path) -> None:
    export_package(ExportConfig(package, tmp_path / "again", embed_backbone=False))
    with open_package(tmp_path / "again") as opened:
        assert (opened.backbone.kind, opened.backbone.path) == ("hf", str((package / "backbone").resolve()))


@pytest.mark.parametrize("embed", [True, False])
def test_a_backbone_that_changed_since_training_is_refused(tmp_path: Path, embed: bool) -> None:
    checkpoint(tmp_path)
    (tmp_path / "backbone" / "model.safetensors").write_bytes(b"another")
    with pytest.raises((PackageError, BackboneError), match="backbone file .*model.safetensors has SHA-256"):
        export_package(ExportConfig(tmp_path / "float", tmp_path / "package", embed_backbone=embed))
    assert not list(tmp_path.glob("package*"))


def test_a_hub_backbone_that_is_not_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, BackboneRef("hf", "nobody/nothing"))
    with pytest.raises(PackageError, match="'nobody/nothing' is neither a folder nor in the hub's cache"):
        export_package(ExportConfig(tmp_path / "float", tmp_path / "package"))
    export_package(ExportConfig(tmp_path / "float", tmp_path / "package", embed_backbone=False))
    with open_package(tmp_path / "package") as opened:
        assert opened.backbone.path == "nobody/nothing"


def test_a_damaged_source_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    flip(tmp_path / "quantized" / "tables" / "layer-01.safetensors", 4096 + 17)
    with pytest.raises(RowStoreError, match="damaged: page 0"):
        export_package(ExportConfig(tmp_path / "quantized", tmp_path / "package"))
    flip(tmp_path / "float" / "layers.safetensors", 100)
    with pytest.raises(CheckpointError, match="layers.safetensors has SHA-256"):
        export_package(ExportConfig(tmp_path / "float", tmp_path / "package"))
    with pytest.raises(CheckpointError, match="holds no engram.json"):
        export_package(ExportConfig(tmp_path / "tokenizer", tmp_path / "package"))
    assert not list(tmp_path.glob("package*"))


def test_an_existing_folder_is_refused_and_replaced_by_force(package: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="exists"):
        export_package(ExportConfig(tmp_path / "float", package))
    export_package(ExportConfig(tmp_path / "float", package, force=True))
    with open_package(package) as opened:
        assert opened.layers[1].codec.name == "f32"


@pytest.mark.parametrize("moment", ["layer 5", "copy config.json", "copy model.safetensors"])
def test_a_kill_leaves_no_package_and_hinders_nobody(tmp_path: Path, moment: str) -> None:
    checkpoint(tmp_path)
    code = """
import sys, time
from pathlib import Path
from engram import Progress, Task
from engram.quantize.package import ExportConfig, export_package
class Stop(Progress):
    def task(self, label, total=None, unit=""):
        if label == sys.argv[3]:
            print("here", flush=True)
            time.sleep(60)
        return Task()
export_package(ExportConfig(Path(sys.argv[1]), Path(sys.argv[2])), Stop())
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "quantized"), str(tmp_path / "package"), moment]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"here\n"
        child.send_signal(signal.SIGKILL)
    assert not (tmp_path / "package").exists()
    export_package(ExportConfig(tmp_path / "quantized", tmp_path / "package"))
    assert verify_package(tmp_path / "package")["ok"]
    assert not list(tmp_path.glob("*.partial"))


# What is refused


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def shorten(name: str, by: int = 1) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - by)


def altered(name: str, position: int) -> Callable[[Path], object]:
    return lambda folder: flip(folder / name, position)


def removed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def added(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"x")


def seal(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest that says what it likes, under a seal that fits."""
    blank = (json.dumps(manifest | {"manifest_seal": "0" * 64}, indent=1) + "\n").encode()
    return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)


def relabelled(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A manifest that was edited by someone who knows how to seal it again."""

    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "engram.json").read_bytes())
        change(manifest)
        (folder / "engram.json").write_bytes(seal(manifest))

    return damage


def table(layer: int, **changes: Any) -> Callable[[Path], object]:
    return relabelled(lambda manifest: manifest["tables"][str(layer)].update(changes))


def rewritten(codec: str = "nf4", rows: int = 0, width: int = WIDTH, layer: int = 1) -> Callable[[Path], object]:
    """A sound table file of another kind in the place of layer 1's, with sizes and hashes put right."""

    def damage(folder: Path) -> None:
        path, count = folder / "tables/layer-01.safetensors", layout().table_rows[1] + rows
        block = np.ones((count, width), dtype=np.float32)
        made = write_table(path, [block], rows=count, width=width, codec=CODECS[codec], layer=layer)

        def change(manifest: dict[str, Any]) -> None:
            manifest["bytes"]["tables/layer-01.safetensors"] = made.bytes
            manifest["tables"]["1"] |= {"bytes": made.bytes, "sha256": made.sha256, "seal": made.seal}

        relabelled(change)(folder)

    return damage


def swapped(folder: Path) -> None:
    one, other = (folder / f"tables/layer-0{n}.safetensors" for n in (1, 5))
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)


def same_size_other_rows(folder: Path) -> None:
    count = layout().table_rows[1]
    write_table(
        folder / "tables/layer-01.safetensors", [np.ones((count, WIDTH), np.float32)], rows=count, width=WIDTH,
        codec=CODECS["nf4"], layer=1,
    )  # fmt: skip


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (removed("engram.json"), "is no package: it holds no engram.json"),
    "a truncated manifest": (shorten("engram.json", 40), "is not JSON"),
    "an altered manifest": (
        lambda folder: (folder / "engram.json").write_text(
            (folder / "engram.json").read_text().replace('"hidden": 3', '"hidden": 4')
        ),
        "does not match its seal",
    ),
    "a manifest that is a list": (lambda folder: (folder / "engram.json").write_text("[]"), "has format \\[\\]"),
    "a manifest of another format": (relabelled(lambda m: m.update(format="engram-checkpoint")), "has format"),
    "a later version": (relabelled(lambda m: m.update(version=3)), "has version 3, this release reads 2"),
    "the version before": (relabelled(lambda m: m.update(version=1)), "has version 1, this release reads 2"),
    "no version": (relabelled(lambda m: m.pop("version")), "has version None"),
    "an unknown field": (relabelled(lambda m: m.update(extra=1)), "has the fields"),
    "a missing field": (relabelled(lambda m: m.pop("gate")), "has the fields"),
    "a field of another type": (relabelled(lambda m: m.update(tables=[])), "of the wrong type"),
    "a later layout": (relabelled(lambda m: m["layout"].update(version=2)), "layout has version 2"),
    "another multiplier count": (relabelled(lambda m: m["layout"]["multipliers"]["1"].pop()), "has 2 multipliers"),
    "a missing table": (removed("tables/layer-05.safetensors"), "layer-05.safetensors is missing"),
    "a missing tokenizer": (removed("tokenizer.json"), "tokenizer.json is missing"),
    "a missing token map": (removed("token_map.safetensors"), "token_map.safetensors is missing"),
    "a missing backbone file": (removed("backbone/model.safetensors"), "model.safetensors is missing"),
    "a truncated table": (shorten("tables/layer-01.safetensors"), "layer-01.safetensors has .* it is truncated"),
    "truncated dense weights": (shorten("layers.safetensors"), "layers.safetensors has .* it is truncated"),
    "a truncated backbone": (shorten("backbone/model.safetensors"), "model.safetensors has .* it is truncated"),
    "altered dense weights": (altered("layers.safetensors", -1), "layers.safetensors has SHA-256 .* it was altered"),
    "an altered token map": (altered("token_map.safetensors", -8), "token_map.safetensors has SHA-256"),
    "an altered tokenizer": (altered("tokenizer.json", 5), "tokenizer.json has SHA-256"),
    "an altered small backbone file": (altered("backbone/config.json", 5), "config.json has SHA-256"),
    "an altered table header": (altered("tables/layer-01.safetensors", 60), "layer-01.safetensors has"),
    "altered table checksums": (altered("tables/layer-01.safetensors", -9), "not the one that the manifest describes"),
    "a backbone embedded elsewhere": (
        relabelled(lambda m: m["backbone"].update(path="../elsewhere")), "embedded in '../elsewhere'"
    ),
    "a longer table": (
        lambda folder: (folder / "tables/layer-01.safetensors").open("ab").write(b"\0"), "it is longer"
    ),
    "swapped tables": (swapped, "layer-01.safetensors has"),
    "another table of the same shape": (same_size_other_rows, "not the one that the manifest describes"),
    "a table of another codec": (rewritten(codec="bf16"), "has codec 'bf16', expected 'nf4'"),
    "a table of another width": (rewritten(width=10), "has width 10, expected 8"),
    "a table of more rows": (rewritten(rows=1), "has rows .*, expected"),
    "a table of another layer": (rewritten(layer=5), "has layer 5, expected 1"),
    "a codec named wrongly": (table(1, codec="f32"), "has codec 'nf4', expected 'f32'"),
    "an unknown codec": (table(1, codec="int3"), "codec 'int3' is not known"),
    "a later codec": (table(1, codec_version=2), "has version 2, this release knows version 1"),
    "rows named wrongly": (table(5, rows=7), "has a table of 7 rows for layer 5, its layout has"),
    "a width named wrongly": (table(5, width=16), "has a table of 16 width for layer 5, its layout has 8"),
    "a table for no layer": (
        relabelled(lambda m: m["tables"].update({"6": m["tables"].pop("5")})), "has tables for layers \\[1, 6\\]"
    ),
    "a layer without a gate": (relabelled(lambda m: m["gate"].pop("5")), "has gate for layers \\[1\\]"),
    "a path out of the package": (
        relabelled(lambda m: (m["sha256"].update({"../x": "0"}), m["bytes"].update({"../x": 1}))), "may lie outside"
    ),
    "a file that has no hash": (relabelled(lambda m: m["sha256"].pop("tokenizer.json")), "names other files"),
    "a stowaway in the backbone": (added("backbone/pytorch_model.bin"), "is not part of the package"),
    "a stowaway among the tables": (added("tables/layer-09.safetensors"), "is not part of the package"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_refuses_a_package_with(package: Path, case: str) -> None:
    damage, words = DAMAGES[case]
    damage(package)
    with pytest.raises(PackageError, match=words):
        open_package(package)
    if case != "no manifest":
        verified = verify_package(package)
        assert not verified["ok"] and any(re.search(words, problem) for problem in verified["problems"])


def test_an_altered_page_is_refused_at_first_touch(package: Path) -> None:
    path = package / "tables" / "layer-05.safetensors"
    flip(path, 4096 + 4096 + 100)
    with open_package(package) as opened:
        opened.layers[5].gather(np.arange(682))  # 6 bytes a row, 682 rows a page
        with pytest.raises(RowStoreError, match=r"\(layer 5\) is damaged: page 1, rows 682 to 1363"):
            opened.layers[5].gather(np.array([700]))
    with pytest.raises(PackageError, match="damaged: page 1, rows 682 to 1363"):
        open_package(package, verify="open")
    open_package(package, verify="off").close()
    problems = verify_package(package)["problems"]
    assert len(problems) == 2 and "it was altered" in problems[0] and "page 1, rows 682 to 1363" in problems[1]


def test_an_altered_large_backbone_file_is_found_by_verify(package: Path) -> None:
    flip(package / "backbone" / "model.safetensors", 1 << 20)
    open_package(package).close()
    assert "model.safetensors has SHA-256" in verify_package(package)["problems"][0]


@pytest.fixture
def mapped(package: Path, tmp_path: Path) -> Path:
    """The package with the rows of layer 5 in a foreign file, which an extent map names."""
    expected = every_row(package)
    with open_package(package) as opened:
        codec, rows = opened.layers[5].codec, opened.layers[5].gather(np.arange(opened.layers[5].rows))
    (tmp_path / "foreign").write_bytes(b"not ours" + rows.tobytes())
    made = package / "tables" / "layer-05.extents.safetensors"
    source = Source(tmp_path / "foreign", 8, rows.shape[1], rows.shape[1], len(rows))
    map_extents(made, [[source]], codec, rows=len(rows), width=WIDTH, layer=5)

    def change(manifest: dict[str, Any]) -> None:
        digest, size = hashlib.sha256(made.read_bytes()).hexdigest(), made.stat().st_size
        name = f"tables/{made.name}"
        manifest["tables"]["5"] |= {"file": name, "bytes": size, "sha256": digest, "seal": digest}
        del manifest["bytes"]["tables/layer-05.safetensors"]
        manifest["bytes"][name] = size

    (package / "tables" / "layer-05.safetensors").unlink()
    relabelled(change)(package)
    found = every_row(package)
    assert found.keys() == expected.keys() and all(np.array_equal(found[n], expected[n]) for n in expected)
    return package


def test_a_table_may_be_an_extent_map(mapped: Path, tmp_path: Path) -> None:
    assert verify_package(mapped)["ok"]
    export_package(ExportConfig(mapped, tmp_path / "again"))  # its rows move in
    assert (tmp_path / "again" / "tables" / "layer-05.safetensors").is_file()
    expected = every_row(mapped)
    assert all(np.array_equal(rows, expected[n]) for n, rows in every_row(tmp_path / "again").items())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: flip(folder / "foreign", 100), "foreign (layer 5) is damaged: page 0"),
        (lambda folder: shorten("foreign")(folder), "foreign has "),
        (lambda folder: (folder / "foreign").unlink(), "foreign cannot be opened: No such file"),
        (lambda folder: flip(folder / "package/tables/layer-05.extents.safetensors", 30), "extent map"),
    ],
)
def test_a_damaged_extent_map_or_its_file_is_refused(
    mapped: Path, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(tmp_path)
    assert any(words in problem for problem in verify_package(mapped)["problems"])
    with pytest.raises((PackageError, RowStoreError), match=re.escape(words)):
        every_row(mapped)


def test_verify_finds_a_row_without_a_finite_scale(package: Path) -> None:
    """Bytes that no writer of ours makes, under checksums that fit."""
    from engram.quantize.row_store import RowWriter

    count = layout().table_rows[1]
    encoded = CODECS["nf4"].encode(np.ones((count, WIDTH), np.float32))
    encoded[77, -2:] = [0, 0x7E]  # the fp16 scale
    path = package / "tables" / "layer-01.safetensors"
    with RowWriter(path, count, WIDTH, CODECS["nf4"], 1) as writer:
        writer.append(encoded)
    assert writer.table_file is not None
    made = writer.table_file
    table(1, sha256=made.sha256, seal=made.seal)(package)
    assert verify_package(package)["problems"] == [f"table file {path} (layer 1): row 77 is not finite"]


def test_verify_counts_what_it_checked(package: Path) -> None:
    verified = verify_package(package)
    rows = sum(layout().table_rows.values())
    assert verified["ok"] and verified["problems"] == []
    assert verified["checked"]["rows"] == rows and verified["checked"]["tables"] == 2
    assert verified["checked"]["files"] == 7
    assert verified["checked"]["bytes"] + (package / "engram.json").stat().st_size == sum(
        path.stat().st_size for path in package.rglob("*") if path.is_file()
    )


def test_verify_gathers_all_problems(package: Path) -> None:
    flip(package / "tokenizer.json", 3)
    removed("layers.safetensors")(package)
    flip(package / "tables" / "layer-01.safetensors", 5000)
    problems = verify_package(package)["problems"]
    for words in ("tokenizer.json has SHA-256", "layers.safetensors is missing", "damaged: page 0"):
        assert any(words in problem for problem in problems)


def test_no_package_at_all_is_an_error(tmp_path: Path) -> None:
    for read in (open_package, verify_package):
        with pytest.raises(PackageError, match="is no package: it holds no engram.json"):
            read(tmp_path / "none")
