"""`engram bench`: nothing is timed before it is right, and neither warm nor cold is believed without proof."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import tiny

from engram.builders.layout import Layout
from engram.cli import main as cli
from engram.kernels import dispatch
from engram.kernels.codecs import CODECS, find_codec
from engram.quantize.mapped import MappedTable
from engram.quantize.package import ExportConfig, export_package
from engram.runtime import (
    bench_decode,
    bench_files,
    bench_hash,
    bench_kernels,
    bench_report,
    bench_rows,
    bench_states,
    device_probe,
)
from engram.runtime.bench_race import BenchError, Contender, ParityError, Trace, gate, race
from engram.runtime.bench_rows import BenchRowsConfig
from engram.runtime.coldness import ColdnessError, device_bytes, make_cold, make_warm, resident_share

QUICK = ("--seconds", "0.5", "--rows", "8,64")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    checkpoint = tiny.write_checkpoint(folder, rows_per_head=20_011)
    export_package(ExportConfig(checkpoint, folder / "package"))
    (folder / "text.txt").write_text(tiny.TEXT * 8)
    return folder / "package"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scratch files go where the test can see that none is left."""
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    """A file of 4 MiB on a file system that can drop it from its cache."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4 << 20))
    try:
        make_cold(path)
    except ColdnessError as why:
        pytest.skip(f"no cold files here: {why}")
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leaving:
        cli.main(list(words))
    out, err = capsys.readouterr()
    return int(leaving.value.code or 0), out, err


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    assert {"cpu", "cores", "kernels", "versions"} <= set(found["machine"])
    return found


def test_cold_and_warm_are_proven(on_disk: Path) -> None:
    assert resident_share(on_disk) <= 0.001
    before, how = device_bytes(on_disk)
    assert make_warm(on_disk) == 1.0
    assert resident_share(on_disk) == 1.0
    assert device_bytes(on_disk)[0] - before >= 4 << 20 and how
    assert make_cold(on_disk) <= 0.001
    make_warm(on_disk, np.array([3, 700]))
    assert resident_share(on_disk, np.array([3, 700])) == 1.0


def test_a_file_in_use_is_not_cold(on_disk: Path) -> None:
    with on_disk.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        assert len(bytes(held)) == 4 << 20
        with pytest.raises(ColdnessError, match="cannot be made cold: .*stay in the page cache"):
            make_cold(on_disk, patience_s=0.1)
    assert make_cold(on_disk) <= 0.001


def test_the_probe_sweeps_depths(on_disk: Path, tmp_path: Path) -> None:
    found = device_probe.sweep(on_disk, 0.05, depths=(1, 4))
    assert set(found["reads_per_second"]) == {1, 4}
    assert found["best"] == max(found["reads_per_second"].values()) > 0
    (tmp_path / "small").write_bytes(b"1")
    with pytest.raises(device_probe.ProbeError, match="has 1 bytes"):
        device_probe.sweep(tmp_path / "small", 0.05)


def test_trace_gives_fresh_ids_until_it_ends() -> None:
    trace = Trace(np.arange(10))
    assert [trace.draw(4).tolist() for _ in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    assert trace.draw(12).tolist() == [*range(10), 0, 1]


def test_gate_refuses_one_wrong_bit() -> None:
    def wrong(ids: Any) -> Any:
        out = ids.astype(np.float32)
        out.view(np.uint32)[3] ^= 1
        return out

    right = Contender("right", lambda ids: ids.astype(np.float32), lambda ids: ids.astype(np.float32))
    gate([right], np.arange(8))
    broken = Contender("broken", wrong, right.truth)
    with pytest.raises(ParityError, match="broken differs from the reference in 1 of 8 values, first for row 3"):
        gate([right, broken], np.arange(8))
    gate([Contender("near", wrong, right.truth, tolerance=1e-5)], np.arange(8))
    shape = Contender("short", lambda ids: np.zeros(3, np.float32), right.truth)
    with pytest.raises(ParityError, match=r"float32 \[3\], the reference float32 \[8\]"):
        gate([shape], np.arange(8))


def test_race_gives_everybody_the_same_turns() -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}

    def note(name: str) -> Contender:
        return Contender(name, lambda ids: seen[name].append(int(ids[0])), lambda ids: ids)

    found = race([note("a"), note("b")], Trace(np.arange(10_000)).draw, 10, rounds=4, turn_s=1e-6)
    assert {len(timing.seconds) for timing in found.values()} == {4}
    drawn = [*seen["a"], *seen["b"]]
    assert len(drawn) == len(set(drawn)), "no id was asked for twice"


@pytest.mark.parametrize("codec", CODECS)
def test_memory_contenders_equal_the_reference(codec: str) -> None:
    table = bench_kernels.random_table(CODECS[codec], 9000, 64)
    both = [bench_kernels.ours(CODECS[codec], table, 64, 32, bf16=bf16) for bf16 in (False, True)]
    others = [bench_kernels.raw_copy(table, 32), bench_kernels.numpy_decode(CODECS[codec], table, 64, 32)]
    gate([*both, *others], np.random.default_rng(0).integers(0, 9000, 32))


@pytest.mark.parametrize("bits", [8, 4])
def test_torch_contenders_equal_their_reference(bits: int) -> None:
    packed = bench_kernels.torch_packed(bench_kernels.random_block(64, rows=100), bits)
    gate([bench_kernels.torch_bag(packed, 64, bits, 16)], np.arange(16))
    fp8 = bench_kernels.random_table(find_codec("fp8-e8m0"), 100, 64)
    gate([bench_kernels.torch_fp8(fp8, 64, 16)], np.arange(16))


@pytest.mark.parametrize(("row_bytes", "names"), [(64, ["numpy take(out=)", "numpy memmap[ids]"]),
                                                  (42, ["numpy memmap[ids]"])])  # fmt: skip
def test_numpy_take_needs_rows_that_fill_pages(tmp_path: Path, row_bytes: int, names: list[str]) -> None:
    """Elsewhere it would copy the whole table at each call: measured, 2.6 GB for 128 MB of rows of 42 bytes."""
    per_page = 4096 // row_bytes
    content = np.random.default_rng(0).integers(0, 256, (5, 4096), dtype=np.uint8)
    (tmp_path / "rows").write_bytes(content.tobytes())
    place = bench_files.Place(tmp_path / "rows", 0, 5, 5 * per_page, row_bytes, per_page)
    openers = bench_files.numpy_openers(place, most_rows=64)
    assert [opener.name for opener in openers] == names
    ids = np.array([0, 5 * per_page - 1, per_page, per_page - 1, 7])
    for opener in openers:
        with opener.open() as contender:
            np.testing.assert_array_equal(contender.call(ids), place.read(ids))
            del contender


def test_rows(package: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], on_disk: Path) -> None:
    picture = tmp_path / "rows.png"
    words = ("--text", str(package.parent / "text.txt"), "--peers", "numpy,torch", "--plot", str(picture))
    found = answer(capsys, "bench", "rows", str(package), *QUICK, *words)
    assert found["kernels"] == dispatch.name()
    assert found["table"]["codec"] == "f32" and found["table"]["layer"] == 1
    assert {"engram", "engram, stored bytes", "numpy take(out=)", "numpy memmap[ids]"} <= set(found["parity"]["equal"])
    assert found["warm"]["resident_share_before"] == 1.0
    assert found["cold"]["resident_share_most"] <= 0.001
    for state in ("warm", "cold"):
        for entry in found[state]["results"]:
            assert entry["rows_per_second"] > 0 and entry["rows"] in (8, 64) and entry["trace"] in ("text", "uniform")
    own = [entry for entry in found["cold"]["results"] if entry["name"] == "engram" and entry["trace"] == "uniform"]
    assert [entry["rows"] for entry in own] == [8, 64]
    assert all(entry["device_bytes_per_row"] > 0 for entry in own)
    assert set(found["device"]["reads_per_second"]) == {"1", "8", "32", "128"}
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (880, 1760)
    assert pixels[..., :3].min() < 0.1 < 0.9 < pixels[..., :3].max() and len(np.unique(pixels[..., :3])) > 50
    assert list(cache.iterdir()) == []


def test_rows_in_words(package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = str(package.parent / "text.txt")
    code, out, err = run(capsys, "bench", "rows", str(package), *QUICK, "--text", text, "--no-cold", "--peers", "numpy")
    assert code == 0, err
    assert "rows a second" in out and "warm proven by mincore: 100.00%" in out and "\x1b" not in out + err


def test_a_broken_contender_is_not_timed(
    package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    sound = MappedTable.decode

    def broken(self: MappedTable, rows: Any, out: Any, *, threads: int = 1) -> Any:
        found = sound(self, rows, out, threads=threads)
        found.view(np.uint32)[-1, -1] ^= 1
        return found

    monkeypatch.setattr(MappedTable, "decode", broken)
    monkeypatch.setattr(bench_states, "race", lambda *_, **__: pytest.fail("it was timed"))
    words = ("--text", str(package.parent / "text.txt"), "--peers", "numpy", "--no-cold")
    code, out, err = run(capsys, "bench", "rows", str(package), *QUICK, *words)
    assert code == 1 and "error: engram differs from the reference" in err and not out
    assert list(cache.iterdir()) == []


def test_interrupted_leaves_nothing(
    package: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_states, "race", interrupted)
    config = BenchRowsConfig(package, text=package.parent / "text.txt", cold=False, peers=("numpy",), rows=(8,))
    with pytest.raises(KeyboardInterrupt):
        bench_rows.bench_rows(config)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--peers", "numpy,sqlite"), "peer 'sqlite' is not known"),
        (("--plot", "rows.jpg"), "does not end in .png"),
        (("--plot", "missing/rows.png"), "the folder missing does not exist"),
        (("--layer", "2"), "layer 2 has no table"),
        (("--no-warm", "--no-cold"), "neither warm nor cold"),
        (("--rows", "0,8"), "must be numbers of at least 1"),
        (("--io", "telepathy"), "telepathy"),
    ],
)
def test_rows_refuses(
    package: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "bench", "rows", str(package), "--text", str(package.parent / "text.txt"), *words)
    assert code == 1 and message in err and err.startswith("error: ") and not out


@pytest.mark.parametrize("command", ["rows", "decode", "hash"])
def test_no_package(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("some text")
    words = () if command == "decode" else ("--text", str(tmp_path / "text.txt"))
    code, _, err = run(capsys, "bench", command, str(tmp_path), *words)
    assert code == 1 and err.startswith("error: ") and "hint: " in err


def test_hash(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(package.parent / "text.txt")
    found = answer(capsys, "bench", "hash", str(package), "--text", text, "--tokens", "1,64", "--seconds", "0.3")
    names = {entry["name"] for entry in found["results"]}
    assert names == {bench_hash.OURS, bench_hash.REFERENCE, bench_hash.DEMO} and found["left_out"] == {}
    assert {entry["tokens"] for entry in found["results"]} == {1, 64}
    assert all(entry["tokens_per_second"] > 0 and entry["times_the_demo"] > 0 for entry in found["results"])


def test_hash_gate(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(layout: Layout, ids: Any) -> Any:
        return {layer: rows + 1 for layer, rows in layout.rows(ids).items()}

    monkeypatch.setattr(bench_hash, "demo_hash", moved)
    with pytest.raises(ParityError, match="published demo's method differs"):
        bench_hash.bench_hash(bench_hash.BenchHashConfig(package, text=package.parent / "text.txt", seconds=0.1))


def test_other_dialects_leave_the_demo_out() -> None:
    layout = Layout.build(dialect="qwen-ple", orders=(2,), heads=1, head_dim=4, layers=(0,), rows_per_head=50, pad_id=0,
                          vocab_size=100, reset_id=3)  # fmt: skip
    found, left_out = bench_hash.contenders(layout)
    assert [contender.name for contender in found] == [bench_hash.OURS, bench_hash.REFERENCE]
    assert "qwen-ple" in left_out[bench_hash.DEMO]


def test_decode(package: Path, capsys: pytest.CaptureFixture[str], on_disk: Path) -> None:
    words = ("--prompt", "The memory of a model", "--tokens", "4", "--rounds", "1", "--threads", "1")
    found = answer(capsys, "bench", "decode", str(package), *words)
    assert set(found["results"]) == set(bench_decode.ARMS)
    assert all(arm["decode_tokens_per_second"] > 0 for arm in found["results"].values())
    assert found["cold_resident_share_most"] <= 0.001 and found["results"]["disk_cold"]["device_bytes"] > 0
    assert found["results"]["ram"]["device_bytes"] == 0
    assert set(found["ratios"]) == {"disk_warm/ram", "disk_cold/ram", "ram/none"}


def test_decode_refuses(package: Path) -> None:
    with pytest.raises(BenchError, match="do not fit: the model's context is 256"):
        bench_decode.bench_decode(bench_decode.BenchDecodeConfig(package, prompt="a", tokens=256, arms=("ram",)))
    with pytest.raises(BenchError, match="arm 'tape' is not known"):
        bench_decode.BenchDecodeConfig(package, arms=("tape",))


def test_json_file_is_whole_and_plain(tmp_path: Path) -> None:
    content = {"a": np.float32(1), "b": [float("nan")], "c": Path("/x/y"), "d": {1: 2}}
    bench_report.save_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1.0, "b": [None], "c": "y", "d": {"1": 2}}
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.json"]
