"""Packages with mixed tables: exported, verified, opened and run; entries that do not fit their table are refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixed_tables
import numpy as np
import pytest
import tiny

from engram.builders.corpus import CorpusConfig
from engram.builders.fetch import hash_file
from engram.builders.layout import Layout
from engram.kernels.codecs import Floats
from engram.quantize.package import ExportConfig, PackageError, export_package, open_package
from engram.quantize.tables import QuantizeConfig, quantize
from engram.quantize.verify import verify_package
from engram.runtime import hot_rows, warm
from engram.runtime.bench_race import BenchError
from engram.runtime.bench_rows import BenchRowsConfig, bench_rows
from engram.runtime.generate import RunConfig, run
from engram.runtime.hot_rows import HotRowsError
from engram.runtime.reader import PLACEMENTS, RowReader

Model = dict[int, Floats]


def seal(manifest: dict[str, Any]) -> bytes:
    blank = (json.dumps(manifest | {"manifest_seal": "0" * 64}, indent=1) + "\n").encode()
    return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hash_file(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """A quantized checkpoint whose layer 3 is mixed, and the package of it; what the rows of layer 3 must be."""
    folder = tmp_path_factory.mktemp("mixed")
    checkpoint = tiny.write_checkpoint(folder)
    quantize(QuantizeConfig(checkpoint, folder / "q", tables="int8"))
    rows = Layout.load(checkpoint).table_rows[3]
    class_N = mixed_tables.random_classes(rows)
    (folder / "q" / "tables" / "layer-03.safetensors").unlink()
    _, values, entry = mixed_tables.write(folder / "q", class_N, width=8, layer=3)
    manifest = json.loads((folder / "q" / "engram.json").read_bytes())
    manifest["tables"]["3"] = entry
    (folder / "q" / "engram.json").write_text(json.dumps(manifest))
    report = export_package(ExportConfig(folder / "q", folder / "package"))
    assert report["tables"]["3"]["codec"] == "mixed"
    assert report["tables"]["3"]["bytes"] == sum(p.stat().st_size for p in (folder / "q/tables").glob("layer-03.*"))
    return folder, mixed_tables.model(values, class_N)


@pytest.fixture
def package(made: tuple[Path, Model], tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    export_package(ExportConfig(made[0] / "package", tmp_path / "package"))
    assert contents(tmp_path / "package") == contents(made[0] / "package")
    return tmp_path / "package"


def test_parts_are_copied_and_verified(made: tuple[Path, Model], package: Path) -> None:
    before, after = contents(made[0] / "q"), contents(package)
    tables = {name for name in after if name.startswith("tables/")}
    assert tables == {"tables/layer-01.safetensors", "tables/layer-03.mixed.safetensors"} | {
        f"tables/layer-03.{number}.safetensors" for number in (0, 1, 3)
    }
    assert all(before[name] == after[name] for name in tables)
    verified = verify_package(package)
    assert verified["ok"] and verified["checked"]["tables"] == 2
    with open_package(package) as opened:
        assert verified["checked"]["rows"] == sum(table.rows for table in opened.layers.values())
        assert verified["checked"]["pages"] == sum(table.pages for table in opened.layers.values())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_gives_each_row_by_its_own_codec(made: tuple[Path, Model], placement: str) -> None:
    folder, expected = made
    with open_package(folder / "package") as opened:
        reader = RowReader(opened, placement, cache_bytes=0)
        rows = np.random.default_rng(0).permutation(len(expected))[None, :, None]
        out = np.full((1, len(expected), 8), np.nan, np.float32)
        reader.take(reader.ask({3: rows}), 3, out=out)
        assert out.tobytes() == np.stack([expected[r] for r in rows.ravel().tolist()]).tobytes()


def test_it_runs_the_same_in_every_placement(made: tuple[Path, Model]) -> None:
    texts = []
    for placement in ("none", "ram", "disk"):
        result = run(RunConfig(made[0] / "package", prompt=tiny.TEXT, max_tokens=12, offload=placement), lambda _: None)
        texts.append(result["token_ids"])
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 12


def relabelled(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """An entry that was edited by someone who knows how to seal the manifest again."""

    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "engram.json").read_bytes())
        change(manifest["tables"]["3"])
        (folder / "engram.json").write_bytes(seal(manifest))

    return damage


def part(number: int, **changes: Any) -> Callable[[Path], None]:
    return relabelled(lambda entry: entry["parts"][number].update(changes))


def swapped(folder: Path) -> None:
    one, other = (folder / f"tables/layer-03.{n}.safetensors" for n in (0, 1))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def flipped(name: str, position: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 4
        (folder / name).write_bytes(content)

    return damage


def doubled(entry: dict[str, Any]) -> None:
    entry["parts"][1] = entry["parts"][0]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a part missing": (
        lambda folder: (folder / "tables/layer-03.1.safetensors").unlink(), "layer-03.1.safetensors is missing"
    ),
    "a map missing": (
        lambda folder: (folder / "tables/layer-03.mixed.safetensors").unlink(), "mixed.safetensors is missing"
    ),
    "parts swapped": (swapped, "layer-03.0.safetensors has .* bytes, the manifest says"),
    "an altered map": (flipped("tables/layer-03.mixed.safetensors", -9), "does not match its checksum"),
    "altered checksums of a part": (flipped("tables/layer-03.3.safetensors", -7), "as class 3"),
    "a stowaway": (
        lambda folder: (folder / "tables/layer-03.2.safetensors").write_bytes(b"x"), "is not part of the package"
    ),
    "two parts of a class": (relabelled(doubled), "names other files|has the classes"),
    "two entries of the dropped class": (
        relabelled(lambda entry: entry["parts"].append(entry["parts"][2])), r"has the classes \[0, 1, 2, 3, 2\]"
    ),
    "a class without an entry": (relabelled(lambda entry: entry["parts"].pop(2)), r"has the classes \[0, 1, 3\]"),
    "no parts": (relabelled(lambda entry: entry.pop("parts")), "names other files|has 0 parts"),
    "another codec": (part(1, codec="nf4"), "has codec 'nf4' for class 1 of layer 3, its table has 'int8'"),
    "another codec version": (part(1, codec_version=2), "has codec_version 2 for class 1"),
    "other rows": (part(3, rows=5), "has rows 5 for class 3 of layer 3"),
    "another seal": (part(0, seal="0" * 64), "has seal '0000"),
    "another size": (part(0, bytes=17), "has bytes 17 for class 0"),
    "a codec for what is dropped": (part(2, codec="int8", codec_version=1), "has codec 'int8' for class 2"),
    "a hash for what has no file": (part(2, sha256="0" * 64), "has sha256 '0000.* for class 2"),
    "an unknown field": (part(2, extra=1), "has the fields .* for class 2 of layer 3"),
    "a missing field": (relabelled(lambda entry: entry["parts"][2].pop("bytes")), "has the fields"),
    "parts of another type": (relabelled(lambda entry: entry.update(parts=7)), "of the wrong type"),
    "a later version": (relabelled(lambda entry: entry.update(codec_version=2)), "mixed table of version 2"),
    "another codec for the whole": (relabelled(lambda entry: entry.update(codec="int8")), "codec 'mixed', expected"),
    "another seal of the whole": (relabelled(lambda entry: entry.update(seal="0" * 64)), "not the one that the manif"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_refuses_a_package_with(package: Path, case: str) -> None:
    damage, words = DAMAGES[case]
    damage(package)
    with pytest.raises(PackageError, match=words):
        open_package(package)
    verified = verify_package(package)
    assert not verified["ok"] and any(re.search(words, problem) for problem in verified["problems"])


def test_an_ordinary_table_labelled_mixed_is_refused(package: Path) -> None:
    manifest = json.loads((package / "engram.json").read_bytes())
    for change, words in (({"codec": "mixed"}, "has codec 'int8', expected 'mixed'"),
                          ({"codec": "int8", "parts": []}, "has 0 parts for layer 1")):  # fmt: skip
        manifest["tables"]["1"] |= change
        (package / "engram.json").write_bytes(seal(manifest))
        with pytest.raises(PackageError, match=words):
            open_package(package)


def test_an_altered_page_of_a_part_is_found(package: Path) -> None:
    flipped("tables/layer-03.1.safetensors", 4096 + 20)(package)
    with open_package(package) as opened, pytest.raises(Exception, match=r"layer-03.1.* is damaged: page 0"):
        list(opened.layers[3].decoded_blocks())
    with pytest.raises(PackageError, match="is damaged: page 0"):
        open_package(package, verify="open")
    problems = verify_package(package)["problems"]
    assert len(problems) == 2 and "it was altered" in problems[0] and "is damaged: page 0" in problems[1]
    with pytest.raises(Exception, match=r"layer-03.1.* is damaged: page 0"):
        export_package(ExportConfig(package, package.parent / "again"))


def test_hot_rows_and_the_row_bench_say_that_they_want_one_codec(made: tuple[Path, Model], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT * 20)
    words = "the table of layer 3 in .* mixes codecs; hot rows are kept of tables that have one"
    with pytest.raises(HotRowsError, match=words):
        warm.warm(warm.WarmConfig(made[0] / "package", CorpusConfig((str(text),)), size=40_000))
    with open_package(made[0] / "package") as opened:
        assert hot_rows.for_reader(opened) == {}
        (tmp_path / "layer-03.safetensors").write_bytes(b"")
        with pytest.raises(HotRowsError, match=words):
            hot_rows.load_all(opened, tmp_path)
    with pytest.raises(BenchError, match="mixes codecs"):
        bench_rows(BenchRowsConfig(made[0] / "package", layer=3))
