"""A quantization that was killed, stopped or judged: what stays, what the next run goes on with, what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from float_tables import Recorder, checkpoint, run_child
from mixed_tables import PLAN

from engram.builders.atomic import MARK
from engram.kernels.codecs import CodecError
from engram.quantize.tables import QuantizeConfig, QuantizeError, quantize

MANY = 2000  # rows of a head, for tables of some 8000 rows

BLOCKWISE = """
import os, signal, sys
from pathlib import Path
from engram import Progress, Task
from engram.quantize import journal, stream, tables
sys.path.insert(0, sys.argv.pop())
from mixed_tables import PLAN
journal.EVERY_S = 0
stream.BLOCK_BYTES = 64 * 4 * 8
class Stop(Progress):
    def say(self, text):
        print(text, flush=True)
    def __init__(self, layer, rows, how):
        self.layer, self.rows, self.how = layer, rows, how
    def task(self, label, total=None, unit=""):
        outer = self
        class Counting(Task):
            done = 0
            def advance(self, amount=1):
                self.done += amount
                if label.startswith("layer " + outer.layer) and self.done > outer.rows:
                    if outer.how == "disk full":
                        raise OSError(28, "No space left on device")
                    os.kill(os.getpid(), getattr(signal, outer.how))
        return Counting()
source, out, codec, layer, rows, how = sys.argv[1:]
plans = {n: PLAN for n in (1, 5)} if codec == "mixed" else None
tables.quantize(tables.QuantizeConfig(Path(source), Path(out), codec, plans), Stop(layer, int(rows), how))
"""


def interrupted(folder: Path, layer: int, rows: int, how: str = "SIGKILL", codec: str = "int8") -> str:
    """Quantize in a child that ends when it has done more than so many rows of a layer; what it said."""
    here = Path(__file__).parent
    with run_child(BLOCKWISE, folder / "float", folder / "out", codec, layer, rows, how, here) as child:
        said = child.communicate()[0].decode()
    assert child.returncode
    assert not (folder / "out").exists()
    return said


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def noted_rows(folder: Path, layer: int) -> int:
    notes = json.loads((folder / "out.partial" / MARK).read_bytes())["notes"]
    return int(notes[str(layer)]["rows"])


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "disk full"])
@pytest.mark.parametrize(("layer", "rows"), [(1, 0), (1, 3000), (5, 0), (5, 5000)])
def test_an_interrupted_run_goes_on(tmp_path: Path, how: str, layer: int, rows: int) -> None:
    """At a row of the layer that it was at, with the same files and the same errors as a run without a break."""
    tables = checkpoint(tmp_path / "float", rows_per_head=MANY)
    whole = quantize(QuantizeConfig(tmp_path / "float", tmp_path / "whole"))
    said = interrupted(tmp_path, layer, rows, how)
    assert ("the same command goes on from there" in said) == (how != "SIGKILL")
    recorder = Recorder()
    again = quantize(QuantizeConfig(tmp_path / "float", tmp_path / "out"), recorder)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))
    for number, table in again["tables"].items():
        expected = whole["tables"][number]
        assert table["rel_error"] == pytest.approx(expected["rel_error"], rel=1e-12)
        assert {k: v for k, v in table.items() if k != "rel_error"} == {
            k: v for k, v in expected.items() if k != "rel_error"
        }
    if rows:
        assert any(f"layer {layer}: going on at row " in line for line in recorder.said)
    assert ("layer 1: written by an earlier run" in recorder.said) == (layer == 5)
    assert recorder.done[f"layer {layer} to int8"] == len(tables[layer])


def test_an_interruption_while_going_on(tmp_path: Path) -> None:
    """Killed again and again, always further on."""
    checkpoint(tmp_path / "float", rows_per_head=MANY)
    quantize(QuantizeConfig(tmp_path / "float", tmp_path / "whole", tables="nf4"))
    noted = []
    for rows in (2000, 4000, 6000):
        interrupted(tmp_path, 1, rows, codec="nf4")
        noted.append(noted_rows(tmp_path, 1))
    assert noted == sorted(set(noted)) and noted[0] > 0
    quantize(QuantizeConfig(tmp_path / "float", tmp_path / "out", tables="nf4"))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize(("layer", "rows"), [(1, 3000), (5, 100), (5, 5000)])
@pytest.mark.parametrize("damaged", [False, True])
def test_an_interrupted_mixed_table_goes_on(tmp_path: Path, layer: int, rows: int, damaged: bool) -> None:
    """All classes from the row that all of them hold; from the start where one of them is damaged."""
    tables = checkpoint(tmp_path / "float", rows_per_head=MANY)
    plans = {n: PLAN for n in tables}
    whole = quantize(QuantizeConfig(tmp_path / "float", tmp_path / "whole", plans=plans))
    interrupted(tmp_path, layer, rows, codec="mixed")
    begun = noted_rows(tmp_path, layer)
    if damaged:
        damage_page(tmp_path)
    recorder = Recorder()
    again = quantize(QuantizeConfig(tmp_path / "float", tmp_path / "out", plans=plans), recorder)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole") and begun % 64 == 0
    for number, table in again["tables"].items():
        assert table["rel_error"] == pytest.approx(whole["tables"][number]["rel_error"], rel=1e-12)
    words = "what an earlier run wrote is damaged: starting over, not at" if damaged else "going on at"
    assert f"layer {layer}: {words} row {begun:,} of {len(tables[layer]):,}" in recorder.said


def damage_page(folder: Path) -> None:
    path = next((folder / "out.partial" / "tables").glob("*.partial"))
    data = bytearray(path.read_bytes())
    data[4096 + 5] ^= 1
    path.write_bytes(data)


def cut_off(folder: Path) -> None:
    path = next((folder / "out.partial" / "tables").glob("*.partial"))
    os.truncate(path, 4096)


def touch(folder: Path) -> None:
    os.utime(folder / "float" / "tables" / "layer-05.safetensors", (1, 1))


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another codec": (lambda folder: None, "(other codecs)"),
    "a newer table": (touch, "(other source)"),
    "half a journal": (
        lambda f: os.truncate(f / "out.partial" / MARK, 60), "(it holds nothing to go on from)"
    ),
    "a flipped bit": (damage_page, "layer 1: what an earlier run wrote is damaged: starting over"),
    "a file cut off": (cut_off, "layer 1: what an earlier run wrote is damaged: starting over"),
    "no file": (
        lambda f: next((f / "out.partial" / "tables").glob("*.partial")).unlink(),
        "layer 1: what an earlier run wrote is damaged: starting over",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_what_does_not_match_starts_over(tmp_path: Path, case: str) -> None:
    change, words = CHANGES[case]
    checkpoint(tmp_path / "float", rows_per_head=MANY)
    codec = "int8-row" if case == "another codec" else "int8"
    quantize(QuantizeConfig(tmp_path / "float", tmp_path / "whole", tables=codec))
    interrupted(tmp_path, 1, 3000)
    assert noted_rows(tmp_path, 1) > 0
    (tmp_path / "out.partial" / "stray").write_text("of another time")
    change(tmp_path)
    recorder = Recorder()
    quantize(QuantizeConfig(tmp_path / "float", tmp_path / "out", tables=codec), recorder)
    assert any(words in line for line in recorder.said), recorder.said
    (tmp_path / "out" / "stray").unlink(missing_ok=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_something_else_of_the_unfinished_name_is_left_alone(tmp_path: Path, what: str) -> None:
    checkpoint(tmp_path / "float")
    place = tmp_path / "out.partial"
    if what == "folder":
        place.mkdir()
        (place / "thesis.txt").write_text("all I have")
    elif what == "file":
        place.write_text("all I have")
    else:
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    words = {"folder": "holds files, but not of an unfinished run", "file": "is no folder", "link": "is no folder"}
    with pytest.raises(QuantizeError, match=f"out.partial {words[what]}"):
        quantize(QuantizeConfig(tmp_path / "float", tmp_path / "out"))
    assert place.is_symlink() or (place / "thesis.txt" if what == "folder" else place).read_text() == "all I have"


def test_only_what_was_replaced_is_removed(tmp_path: Path) -> None:
    checkpoint(tmp_path / "float")
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "thesis.txt").write_text("all I have")
    for _ in range(2):
        quantize(QuantizeConfig(tmp_path / "float", tmp_path / "out", force=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "out", "out.old", "tokenizer"]
    assert (tmp_path / "out.old" / "thesis.txt").read_text() == "all I have"
    assert not (tmp_path / "out" / MARK).exists()


def test_a_judge_is_asked_before_anything_appears(tmp_path: Path) -> None:
    """What it stops at stays and is not written again; what it refuses is kept aside; its report is in the manifest."""
    checkpoint(tmp_path / "float")
    config = QuantizeConfig(tmp_path / "float", tmp_path / "out")

    def unsure(folder: Path) -> dict[str, Any]:
        assert json.loads((folder / "engram.json").read_bytes())["tables"] and not config.out.exists()
        raise QuantizeError("no verdict")

    recorder = Recorder()
    with pytest.raises(QuantizeError, match="no verdict"):
        quantize(config, recorder, unsure)
    assert any("out.partial keeps what is done" in line for line in recorder.said) and not config.out.exists()
    recorder = Recorder()
    told = quantize(config, recorder, lambda folder: {"passed": False, "why": "worse"})
    assert {"layer 1: written by an earlier run", "layer 5: written by an earlier run"} <= set(recorder.said)
    assert told["out"] == str(tmp_path / "out.rejected") and told["passed"] is False
    manifest = json.loads((tmp_path / "out.rejected" / "engram.json").read_bytes())
    assert manifest["quality"] == {"passed": False, "why": "worse"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "out.rejected", "tokenizer"]

    with pytest.raises(QuantizeError, match="out.rejected exists"):
        quantize(config, judge=lambda folder: pytest.fail("before any work"))
    assert quantize(replace(config, force=True), judge=lambda folder: {"passed": True})["passed"] is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "out", "out.rejected", "tokenizer"]
    with pytest.raises(ValueError, match="JSON"):
        quantize(replace(config, force=True), judge=lambda folder: {"figure": float("nan")})


def test_a_bad_value_behind_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    tables = checkpoint(tmp_path / "good", rows_per_head=MANY)
    tables[5][6321, 4] = np.nan
    checkpoint(tmp_path / "float", tables=tables, rows_per_head=MANY)
    interrupted(tmp_path, 5, 3000)
    with pytest.raises(CodecError, match="layer 5: row 6321, column 4 is nan"):
        quantize(QuantizeConfig(tmp_path / "float", tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "float")
    code = """
import sys, time
from pathlib import Path
from engram.builders.atomic import resumable_folder
with resumable_folder(Path(sys.argv[1])):
    print("here", flush=True)
    time.sleep(60)
"""
    with run_child(code, tmp_path / "out") as child:
        assert child.stdout is not None and child.stdout.readline() == b"here\n"
        with pytest.raises(QuantizeError, match=r"out.partial is being written by another process"):
            quantize(QuantizeConfig(tmp_path / "float", tmp_path / "out"))
        assert (tmp_path / "out.partial").is_dir()
        child.kill()
    quantize(QuantizeConfig(tmp_path / "float", tmp_path / "out"))
