"""`engram plan`: against arithmetic done by hand, simulations, and what must hold for every disk and memory."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from published import write_qwen4_exp, write_qwen4exp_gguf, write_sparse, write_v41

from engram import EngramError
from engram.cli.main import main
from engram.kernels.codecs import find_codec, written_codecs
from engram.quantize.inspect_any import inspect_any
from engram.quantize.package import ExportConfig, export_package
from engram.quantize.tables import QuantizeConfig, quantize
from engram.runtime.doctor import DoctorError
from engram.runtime.kv_size import kv_bytes
from engram.runtime.placement import PlacementConfig, plan
from engram.runtime.placement_cost import Disk, Gather, PlacementError, StoredTable, cost, measure_gather, pages_of

ROWS = (384006168, 384016682)  # of DeepSeek-V4.1-Flash


@pytest.fixture(scope="module")
def v41(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "v41"
    write_v41(folder, shards=4, others=10)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model"))


def planned(model: Path, ram: int = 16 * 10**9, iops: float = 400_000.0, **more: Any) -> dict[str, Any]:
    return plan(PlacementConfig(str(model), ram, iops=iops, **more))


def codec_of(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in result["codecs"] if entry["codec"] == name and not entry["stored"])


def test_the_published_geometry_of_v41_by_hand(v41: Path) -> None:
    found = planned(v41)
    own, packed = found["codecs"][0], codec_of(found, "nf4")
    assert own["stored"] and own["codec"] == "fp8-e8m0" and own["row_bytes"] == 264
    assert own["bytes_per_token"] == 48 * 264 == 12_672
    assert own["disk_bytes"] == sum(ROWS) * 264 == 202_758_032_400
    assert own["reads_per_token"] == 2 * 48, "values and scales are two tensors"
    pages = 48 * (1 + 31 / 512 + 1)  # 256 bytes at multiples of 8: 31 of the 512 places in a page cross its end
    assert own["pages_per_token"] == pytest.approx(pages, rel=1e-5)
    warm = 2 * (8e-3 + 24 * (10 + 0.2 * 256 + 0.15 * 264) * 1e-6)
    assert own["warm_ms_per_token"] == pytest.approx(warm)
    assert own["cold_ms_per_token"] == pytest.approx(0.04 + 0.08 + pages * 4e-3 + warm, rel=1e-4)
    assert packed["reads_per_token"] == 48 and packed["pages_per_token"] == pytest.approx(48, rel=1e-5)
    blocks = [-(-rows // 28) for rows in ROWS]  # 144-byte rows, 28 a page of 4096
    assert packed["disk_bytes"] == sum(4096 + 4096 * count + 4 * (count + 1) for count in blocks)
    assert packed["cached_share"] == pytest.approx(found["resident"]["cache_bytes"] / packed["disk_bytes"])
    least, most = 16_000 * (0.154 + 0.374 + 0.532), 16_000 * (0.75 + 0.86 + 0.91)
    assert packed["reads_per_1000"] == pytest.approx([least, most])
    expected = [0.04 + 0.08 + (n - 1) / 400 + packed["warm_ms_per_1000"] for n in (least, most)]
    assert packed["cold_ms_per_1000"] == pytest.approx(expected, rel=1e-2)


def test_a_slow_disk_hides_the_touching_of_pages(v41: Path) -> None:
    packed = codec_of(planned(v41, iops=1000.0), "nf4")
    assert packed["cold_ms_per_token"] == pytest.approx(0.04 + 1 + 47 + packed["warm_ms_per_token"], rel=1e-4)


def test_every_codec_that_is_written_is_shown_or_left_out_with_its_reason(v41: Path, made: Path) -> None:
    for model in (v41, made):
        found = planned(model)
        shown = [entry["codec"] for entry in found["codecs"] if not entry["stored"]]
        assert set(shown) | set(found["left_out"]) == set(written_codecs()) and len(set(shown)) == len(shown)
        width = inspect_any(str(model))["layers"][0]["width"]
        assert all(codec_of(found, name)["row_bytes"] == find_codec(name).row_bytes(width) for name in shown)
    assert "q8_0" in found["left_out"] and "width" in found["left_out"]["q8_0"]


def test_the_rows_of_an_id_are_read_as_one(tmp_path: Path) -> None:
    config = {"model_type": "gemma3n_text", "vocab_size_per_layer_input": 100_000, "hidden_size_per_layer_input": 256,
              "num_hidden_layers": 21}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_sparse(tmp_path / "model.safetensors", {"model.embed_tokens_per_layer.weight": ("BF16", [100_000, 5376])})
    found = planned(tmp_path)
    pages = np.mean([(at + 10_752 - 1) // 4096 + 1 for at in range(0, 4096, 8)])
    assert found["codecs"][0]["reads_per_token"] == 1
    assert found["codecs"][0]["pages_per_token"] == pytest.approx(pages, rel=1e-4)


@pytest.mark.parametrize("size", [8, 40, 72, 100, 160, 256, 264, 1024, 3072, 5120])
def test_pages_of_a_row_that_may_straddle_against_all_places(size: int) -> None:
    step = math.gcd(size, 8)
    spans = [(at + size - 1) // 4096 + 1 for at in range(0, 4096, step)]
    assert pages_of(size) == pytest.approx(float(np.mean(spans)))


def test_distinct_pages_against_draws() -> None:
    draw = np.random.default_rng(0)
    for pages, rows in ((1, 5), (7, 3), (100, 250), (5000, 4000)):
        table = StoredTable(0, (2,), 8, 64, "f32", 256, pages * 4096, pages)
        seen = [len(np.unique(draw.integers(0, pages, rows))) for _ in range(300)]
        assert table.distinct_pages(rows) == pytest.approx(float(np.mean(seen)), rel=0.02)
    apart = StoredTable(0, (2,), 8, 256, "fp8-e8m0", 264, 264 << 12, 264, (256, 8))  # 256 pages of values, 8 of scales
    drawn = [draw.integers(0, 4096, 100) for _ in range(300)]
    values = [len(np.unique((ids[:, None] * 256 + 8 + np.array([0, 255])) // 4096)) for ids in drawn]
    scales = [len(np.unique(ids // 512)) for ids in drawn]
    assert apart.distinct_pages(100) == pytest.approx(float(np.mean(values) + np.mean(scales)), rel=0.02)


def test_packages_and_quantized_checkpoints_are_read_a_page_a_row(made: Path, tmp_path: Path) -> None:
    quantize(QuantizeConfig(made, tmp_path / "q", tables="nf4"))
    export_package(ExportConfig(tmp_path / "q", tmp_path / "p"))
    for folder in (tmp_path / "q", tmp_path / "p"):
        found = planned(folder)
        own = found["codecs"][0]
        assert own["codec"] == "nf4" and own["reads_per_token"] == 8 and own["pages_per_token"] <= 8
        assert own["disk_bytes"] == sum(path.stat().st_size for path in (folder / "tables").iterdir())
        assert not [entry for entry in found["codecs"][1:] if entry["codec"] == "nf4"], "stored so already"


@given(
    iops=st.floats(1, 1e7), more=st.floats(1, 100), width=st.integers(1, 64).map(lambda n: 16 * n),
    rows=st.integers(1, 1 << 30), ram=st.integers(1, 1 << 40),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_more_is_never_worse(iops: float, more: float, width: int, rows: int, ram: int) -> None:
    def told(rate: float, codec: str) -> tuple[dict[str, Any], int]:
        size = find_codec(codec).row_bytes(width)
        pages = -(-rows // (4096 // size))
        tables = [StoredTable(n, (2, 3), 8, width, codec, size, pages * 4096, pages) for n in (1, 5)]
        return cost(tables, Disk.given(rate), Gather("default", "")), pages

    slow, large = told(iops, "bf16")
    fast, _ = told(iops * more, "bf16")
    small, fewer = told(iops, "nf4")
    assert fewer <= large
    for better in (fast, small):
        assert better["cold_ms_per_token"] <= slow["cold_ms_per_token"] * (1 + 1e-9)
        both = zip(better["cold_ms_per_1000"], slow["cold_ms_per_1000"], strict=True)
        assert all(one <= other * (1 + 1e-9) for one, other in both)
    for one in (slow, fast, small):
        assert one["warm_ms_per_token"] < one["cached_ms_per_token"] < one["cold_ms_per_token"]
        assert one["cold_ms_per_1000"][0] <= one["cold_ms_per_1000"][1]


def test_more_memory_is_never_worse(made: Path) -> None:
    for iops in (90.0, 400_000.0):
        before: dict[str, Any] = {"fits": False, "cached": 0.0, "ram_place": False, "vram": 0}
        for ram in (1, 10**5, 10**6, 3_400_000, 4 * 10**6, 10**7, 10**9):
            for vram in (0, 10**6, 10**9):
                found = planned(made, ram, iops, vram_bytes=vram)
                sums = [found["resident"][f"{name}_bytes"] for name in ("ram", "vram")]
                if found["fits"]:
                    assert sums[0] <= ram and sums[1] <= vram
            now = planned(made, ram, iops)
            in_ram = now["parts"][-1]["place"] == "ram"
            assert now["fits"] >= before["fits"] and in_ram >= before["ram_place"]
            assert now["codecs"][0]["cached_share"] >= before["cached"]
            before = {"fits": now["fits"], "cached": now["codecs"][0]["cached_share"], "ram_place": in_ram}
        assert before["fits"] and before["ram_place"] is (iops == 90), "RAM only where it spares a millisecond"


def test_what_would_fit_fits(made: Path, tmp_path: Path) -> None:
    found = planned(made, 10**6, context=100_000)
    assert found["fits"] is False and "Does not fit" in found["words"][0]
    context = int(re.fullmatch(r"--context (\d+)", found["would_fit"][0])[1])  # type: ignore[index]
    assert planned(made, 10**6, context=context)["fits"] is True
    assert planned(made, 10**6, context=context + 1)["fits"] is False
    over = sum(part["bytes"] for part in found["parts"][:2]) - 10**6
    assert found["would_fit"][-1] == f"{over / 1e6:.1f} MB more RAM or VRAM"
    small = planned(made, 100_000, context=10)
    assert any("--backbone int8" in words for words in small["would_fit"]), "192 kB of float32 are 51 kB of int8"


def test_the_parts_add_up(made: Path) -> None:
    found = planned(made, 10**9, vram_bytes=500_000)
    cache, backbone = found["parts"][:2]
    assert cache["bytes"] == 8192 * 3 * 2 * 8 * 2 * 4, "3 layers, 2 heads, 8 keys and 8 values, float32"
    assert cache["place"] == "vram+ram" and (cache["vram_bytes"], backbone["place"]) == (500_000, "ram")
    assert backbone["bytes"] == sum(path.stat().st_size for path in (made.parent / "backbone").iterdir())
    for place in ("vram", "ram", "disk"):
        assert found["resident"][f"{place}_bytes"] == sum(part[f"{place}_bytes"] for part in found["parts"])
    assert all(part["reason"] for part in found["parts"])


def test_what_is_not_known_is_said_and_not_guessed(v41: Path, made: Path, tmp_path: Path) -> None:
    cache = planned(v41)["parts"][0]
    assert cache["bytes"] is None and cache["place"] is None and "num_key_value_heads" in cache["reason"]
    assert planned(v41)["fits"] is None
    (v41 / "model-00001-of-00004.safetensors").rename(tmp_path / "away")
    try:
        others = planned(v41)["parts"][1]
    finally:
        (tmp_path / "away").rename(v41 / "model-00001-of-00004.safetensors")
    assert others["bytes"] is None and "1 of its files" in others["reason"]


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({}, 10 * 4 * 2 * 2 * 64), ({"head_dim": None}, 10 * 4 * 2 * 2 * 32),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, 10 * 4 * 2 * 2 * 64),
        ({"num_kv_shared_layers": 3}, 10 * 1 * 2 * 2 * 64), ({"num_kv_shared_layers": 4}, None),
        ({"layer_types": ["linear_attention"] * 4}, None), ({"kv_lora_rank": 512}, None), ({"head_dim": "64"}, None),
        ({"num_key_value_heads": None}, None), ({"global_head_dim": 512}, None), ({"num_hidden_layers": -1}, None),
        ({"head_dim": None, "num_attention_heads": 3}, None), ({"compress_ratios": [4]}, None),
    ],
)  # fmt: skip
def test_key_value_caches_by_hand(tmp_path: Path, change: dict[str, Any], size: int | None) -> None:
    config = {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 128,
              "num_attention_heads": 4, "engram_compressed_vocab_size": 9}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config | change}))
    found, words = kv_bytes(tmp_path, 10, 1)
    assert found == size and words


def test_key_value_caches_of_a_gguf_and_of_nothing(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(64)
    writer.add_value_length(32)
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for place in (tmp_path, tmp_path / "m.gguf"):
        assert kv_bytes(place, 10, 2)[0] == 10 * 4 * 2 * (64 + 32) * 2
    (tmp_path / "config.json").write_text("[")
    assert kv_bytes(tmp_path, 10, 2) == (None, "config.json cannot be read")
    (tmp_path / "config.json").write_text('{"text_config": 5}')
    assert kv_bytes(tmp_path, 10, 2)[0] is None
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert kv_bytes(tmp_path / "m.gguf", 10, 2)[0] is None and kv_bytes(None, 10, 2)[0] is None


def test_other_families_and_ggufs_have_plans(tmp_path: Path) -> None:
    write_qwen4_exp(tmp_path / "q")
    write_qwen4exp_gguf(tmp_path / "q.gguf")
    folder, one = planned(tmp_path / "q"), planned(tmp_path / "q.gguf")
    assert folder["codecs"][0]["reads_per_token"] == one["codecs"][0]["reads_per_token"] == 4
    assert one["codecs"][0]["codec"] == "q4_0" and folder["codecs"][0]["codec"] == "f32"


def test_the_disk_and_gathers_are_measured(made: Path, tmp_path: Path) -> None:
    found = plan(PlacementConfig(str(made), 10**9, measure=tmp_path, seconds=0.05))
    assert found["disk"]["source"] == found["gather"]["source"] == "measured" and not list(tmp_path.iterdir())
    rates = found["disk"]["reads_per_second"]
    assert set(rates) == {1, 8, 32, 128} and found["disk"]["iops"] == max(rates.values())
    assert found["disk"]["latency_ms"] == pytest.approx(1e3 / rates[1])
    assert {"f32", "nf4", "h1"} <= set(found["gather"]["ns_per_row"])


def test_a_measured_gather_is_what_a_gather_takes() -> None:
    found = measure_gather([(find_codec("f32"), 256, 24), (find_codec("f32"), 256, 24)], 0.2)
    call, row = found.by_codec["f32"]
    assert 0 <= call < 1e-3 and 1e-9 < row < 1e-5
    table = StoredTable(0, (2, 3, 4), 8, 256, "f32", 1024, 1 << 30, 1 << 18)
    assert found.seconds(table, 1000) == pytest.approx(call + 1000 * row)
    mixed = Gather("measured", "", {"nf4": (1.0, 0.5), "int8": (0.5, 1.0)})
    assert mixed.seconds(StoredTable(0, (2,), 1, 8, "nf4+int8+dropped", 6.0, 1, 1), 10) == 1.0 + 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iops": 0.0}, "--disk-iops 0 must be above 0"), ({"iops": -5.0}, "--disk-iops -5 must"),
        ({"iops": math.nan}, "--disk-iops nan must"), ({"iops": math.inf}, "--disk-iops inf must"),
        ({"ram_bytes": 0}, "--ram 0 must be above 0"), ({"ram_bytes": -1}, "--ram -1"),
        ({"vram_bytes": -1}, "--vram -1 at least 0"), ({"context": 0}, "--context 0 must be at least 1"),
        ({"iops": 5.0, "measure": Path()}, "--disk-iops and --measure both"),
    ],
)  # fmt: skip
def test_what_no_plan_can_be_made_for_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlacementError, match=message) as refused:
        PlacementConfig(**({"model": ".", "ram_bytes": 1} | change))
    assert refused.value.hint


def test_a_probe_that_found_nothing_is_refused() -> None:
    with pytest.raises(PlacementError, match="must be above 0"):
        Disk.of_curve({1: 0.0, 8: 0.0}, "measured", "")


def test_models_and_folders_that_cannot_be_read_are_named(made: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"no")
    for model in (tmp_path / "none", tmp_path, tmp_path / "bad.gguf"):
        with pytest.raises(EngramError, match=model.name):
            planned(model)
    with pytest.raises(DoctorError, match="is no folder"):
        plan(PlacementConfig(str(made), 1, measure=tmp_path / "none"))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leaving:
        main(["plan", *words])
    return int(leaving.value.code or 0), *capsys.readouterr()


def test_the_command_says_what_it_assumed(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, str(made), "--json")
    assert not code and out.count("\n") == 1 and "no --ram" in err and "no --disk-iops and no --measure" in err
    found = json.loads(out)
    assert found["disk"]["source"] == "default" and found["assumptions"]["distinct_share"]["4"] == [0.532, 0.91]
    assert {"parts", "resident", "fits", "would_fit", "codecs", "left_out", "words", "gather"} <= set(found)
    code, out, err = said(capsys, str(made), "--ram", "16GB", "--disk-iops", "400k", "--context", "1k")
    assert not code and "no --" not in err and "It fits" in out and "400,000 reads a second" in out
    code, out, _ = said(capsys, str(made), "--ram", "1kB", "--disk-iops", "400k")
    assert not code and "Does not fit" in out


@pytest.mark.parametrize("words", [["--ram", "16XB"], ["--ram", "-1GB"], ["--ram", "1GB", "--disk-iops", "-5"],
                                   ["--ram", "1GB", "--context", "x"]])  # fmt: skip
def test_what_is_no_size_or_count_is_wrong_usage(
    made: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = said(capsys, str(made), *words)
    assert code == 2 and words[-1] in err


def test_a_system_that_tells_no_memory_wants_it_told(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engram.builders.process_memory.available_bytes", lambda: None)
    code, _, err = said(capsys, str(made))
    assert code == 1 and "does not say how much memory is free" in err and "--ram 16GB" in err


@pytest.mark.parametrize(
    ("rate", "prompt"), [("400k", "92–211"), ("70k", "0.5–1.2s"), ("7k", "5.0–12s"), ("90", "387–917s")]
)
def test_narrow_terminals_cut_nothing(v41: Path, rate: str, prompt: str) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "engram.cli.main", "plan", str(v41), "--ram", "16GB", "--disk-iops", rate]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, cwd=root,
                            env=environment | {"TERM": "xterm", "NO_COLOR": "1"})  # fmt: skip
    os.close(follower)
    text = b""
    while True:
        try:
            part = os.read(leader, 1 << 16)
        except OSError:  # the other side was closed
            break
        if not part:
            break
        text += part
    assert done.wait(60) == 0
    assert not re.search(rb"\x1b\[[0-9;]*3[0-7]m", text), "no colour"
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text.decode()).splitlines()
    assert max(map(len, lines)) <= 80 and prompt in next(line for line in lines if "fp8-e8m0 *" in line)
