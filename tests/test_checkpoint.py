"""Checkpoints: what is written reads back, in other people's readers too, and damage is refused by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from engram import EngramError
from engram.builders.atomic import atomic_folder
from engram.builders.backbone import BackboneError, BackboneRef
from engram.builders.checkpoint import CheckpointError, open_checkpoint, save_checkpoint
from engram.builders.layout import Layout


def layout() -> Layout:
    return Layout.build(
        dialect="demo", orders=(2, 3), heads=2, head_dim=4, layers=(1, 2), rows_per_head=50, pad_id=2, vocab_size=40,
        token_map=np.arange(40),
    )  # fmt: skip


def save(out: Path, **changes: Any) -> dict[int, np.ndarray]:
    made = layout()
    generator = np.random.default_rng(0)
    tables = {n: generator.normal(size=(made.table_rows[n], 4)).astype(np.float32) for n in made.layers}
    tokenizer = out.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    dense = {n: {"value_proj.weight": np.full((3, 16), n, np.float32)} for n in made.layers}
    options: dict[str, Any] = dict(
        layout=made, gates={n: {"hidden": 3, "memory": 16} for n in made.layers}, dense=dense, tables=tables,
        backbone=BackboneRef("hf", "some/model"), tokenizer_folder=tokenizer, extra={"made_by": "test"},
    )  # fmt: skip
    save_checkpoint(out, **(options | changes))
    return tables


def test_round_trip(tmp_path: Path) -> None:
    tables = save(tmp_path / "c", state={"x.json": b"1"})
    opened = open_checkpoint(tmp_path / "c")
    assert opened.layout.to_json() == layout().to_json()
    assert opened.backbone == BackboneRef("hf", "some/model")
    assert opened.gates()[2]["memory"] == 16 and opened.manifest["made_by"] == "test"
    for n, rows in tables.items():
        np.testing.assert_array_equal(opened.table(n), rows)
        assert opened.dense()[n]["value_proj.weight"][0, 0] == n
        theirs = load_file(tmp_path / "c" / "tables" / f"layer-0{n}.safetensors")
        np.testing.assert_array_equal(theirs["rows"], rows)
    assert isinstance(opened.table(1), np.memmap)
    assert (tmp_path / "c" / "state" / "x.json").read_bytes() == b"1"
    assert not list(tmp_path.glob("*.partial"))


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "engram.json").read_text())
        change(manifest)
        (folder / "engram.json").write_text(json.dumps(manifest))

    return damage


def cut(name: str, by: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - by)


TABLE = "tables/layer-01.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda f: (f / "engram.json").unlink(), r"holds no engram\.json"),
    "manifest cut": (cut("engram.json", 9), "not JSON"),
    "another format": (edit(lambda m: m.update(format="other")), "format 'other'"),
    "another version": (edit(lambda m: m.update(version=2)), "version 2"),
    "a field is missing": (edit(lambda m: m.pop("gate")), "lacks the field 'gate'"),
    "dense weights altered": (cut("layers.safetensors", 1), "SHA-256"),
    "tokenizer missing": (lambda f: (f / "tokenizer.json").unlink(), "missing"),
    "table missing": (lambda f: (f / TABLE).unlink(), "layer-01.*missing"),
    "table truncated": (cut(TABLE, 4), "truncated"),
    "table of another layer": (
        lambda f: (f / "tables/layer-02.safetensors").replace(f / TABLE),
        "the layout needs F32",
    ),
    "table header is noise": (lambda f: (f / TABLE).write_bytes(b"\xff" * 64), "no readable header"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_name(tmp_path: Path, name: str) -> None:
    save(tmp_path / "c")
    damage, message = DAMAGES[name]
    damage(tmp_path / "c")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "c")


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    save(tmp_path / "c")
    before = (tmp_path / "c" / "engram.json").read_bytes()
    with pytest.raises(CheckpointError, match="exists"):
        save(tmp_path / "c", extra={"made_by": "another"})
    assert (tmp_path / "c" / "engram.json").read_bytes() == before
    save(tmp_path / "c", extra={"made_by": "another"}, force=True)
    assert open_checkpoint(tmp_path / "c").manifest["made_by"] == "another"


def test_a_failing_write_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "engram.json").touch()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out", force=True) as folder:
        (folder / "new").touch()
        raise RuntimeError
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["out", "out/engram.json"]


def test_force_replaces_nothing_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    for name in ("texts", "file"):
        with pytest.raises(EngramError, match="not an engram folder"), atomic_folder(tmp_path / name, force=True):
            pass
    assert (tmp_path / "texts" / "thesis.txt").exists() and (tmp_path / "file").exists()
    with pytest.raises(EngramError, match="no name"), atomic_folder(Path("/"), force=True):
        pass


def test_a_kill_in_the_middle_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from engram.builders.atomic import atomic_folder
        with atomic_folder(Path(sys.argv[1])) as folder:
            (folder / "half").write_bytes(b"x")
            print("writing", flush=True)
            time.sleep(60)
        """
    )
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"writing\n"
        child.send_signal(signal.SIGKILL)
    assert not out.exists()
    with atomic_folder(out) as folder:
        (folder / "whole").touch()
    assert [p.name for p in out.iterdir()] == ["whole"] and not list(tmp_path.glob("*.partial"))


def test_a_backbone_reference_notices_changes(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    ref = BackboneRef.find(str(tmp_path / "m"))
    ref.verify(tmp_path)
    assert BackboneRef.from_json(ref.to_json()) == ref
    (tmp_path / "m" / "config.json").write_text("{ }")
    with pytest.raises(BackboneError, match="SHA-256"):
        ref.verify(tmp_path)
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(BackboneError, match="missing"):
        ref.verify(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"), [("no/such/model/here", "does not exist"), ("x.gguf", "does not exist"), (".", "config")]
)
def test_a_backbone_that_is_not_there(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=message):
        BackboneRef.find(str(tmp_path) if source == "." else source)


@pytest.mark.parametrize("field", ["kind", "dtype"])
def test_a_wrong_reference_field_is_named(field: str) -> None:
    with pytest.raises(BackboneError, match="'odd'"):
        BackboneRef(**({"kind": "hf", "path": "a/b"} | {field: "odd"}))
    with pytest.raises(BackboneError, match="wrong fields"):
        BackboneRef.from_json({"kind": "hf", "path": "a/b", field: "hf" if field == "kind" else "float32", "odd": 1})
