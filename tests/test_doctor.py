"""`engram doctor`: every finding against what is true of the machine, or was made true; nothing is left behind."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import tiny

from engram.cli.main import main
from engram.kernels import dispatch
from engram.quantize.package import ExportConfig, export_package
from engram.quantize.row_store import RowStoreError
from engram.runtime import doctor
from engram.runtime.doctor import DoctorError, examine


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    export_package(ExportConfig(tiny.write_checkpoint(folder, layers=(1,)), folder / "package"))
    return folder / "package"


def by_name(found: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {one["what"]: one for one in found["findings"]}


def test_what_it_finds_is_so_and_nothing_is_left(tmp_path: Path) -> None:
    found = examine(tmp_path, 0)
    told = by_name(found)
    assert told["row kernels"]["found"] == dispatch.name() and platform.release() in told["system"]["found"]
    assert {one["verdict"] for one in found["findings"]} <= {"ok", "note", "problem"} and found["curve"] is None
    assert all(one["means"] for one in found["findings"]) and not list(tmp_path.iterdir())


def test_the_disk_is_probed_at_every_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_BYTES", 4 << 20)
    found = examine(tmp_path, 0.05)
    rates = found["curve"]["reads_per_second"]
    assert list(rates) == [1, 8, 32, 128] and all(rate > 0 for rate in rates.values())
    assert f"{rates[1]:,.0f} at depth 1" in by_name(found)["random 4 KiB reads a second"]["found"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rates", "direct", "words"),
    [((9_000, 50_000), True, ""), ((90, 120), True, "a hard disk"), ((9_000, 50_000), False, "no direct reads")],
)
def test_a_curve_means_what_it_says(rates: tuple[float, float], direct: bool, words: str) -> None:
    curve = {"reads_per_second": dict(zip((1, 128), rates, strict=True)), "best": max(rates), "direct": direct}
    finding = doctor._disk(curve)
    assert words in finding["means"] and (finding["verdict"] == "ok") == (not words)
    assert f"about {48e3 / max(rates):.1f} ms for 48 rows" in finding["means"]


def test_the_tables_of_a_package_are_looked_at(package: Path) -> None:
    (package / "tables/layer-01.safetensors").read_bytes()  # all of it is in the page cache now
    told = by_name(examine(package, 0))
    finding = told["page cache, layer-01.safetensors"]
    assert finding["found"].startswith("100% of") and finding["means"] == "rows come from memory"


def test_readers_that_are_not_there_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **options: object) -> None:
        raise RowStoreError("io_uring is switched off here")

    monkeypatch.setattr(doctor.MappedTable, "open", refused)
    finding = by_name(examine(tmp_path, 0))["io_uring"]
    assert finding["found"] == "no" and "is switched off here; rows are read through the page cache" in finding["means"]
    with monkeypatch.context() as patch:
        patch.setattr(doctor.dispatch, "name", lambda: "reference")
        assert by_name(examine(tmp_path, 0))["row kernels"]["verdict"] == "problem"


def test_the_command_tells_and_fails_where_there_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["doctor", str(tmp_path), "--seconds", "0s", "--json"])
    assert not left.value.code and json.loads(capsys.readouterr().out)["place"] == str(tmp_path)
    monkeypatch.setattr(doctor.dispatch, "name", lambda: "reference")
    with pytest.raises(SystemExit) as left:
        main(["doctor", str(tmp_path), "--seconds", "0s"])
    assert left.value.code == 1 and "many times slower" in capsys.readouterr().out


def test_what_cannot_be_looked_at_is_refused(tmp_path: Path, package: Path) -> None:
    with pytest.raises(DoctorError, match="nowhere is no folder"):
        examine(tmp_path / "nowhere")
    (tmp_path / "engram.json").write_text("{}")
    with pytest.raises(DoctorError, match="is no sound package"):
        examine(tmp_path, 0)
