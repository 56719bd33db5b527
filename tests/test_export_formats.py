"""`engram export --format`: converted tables as they were published and as other engines read them; what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import write_longcat, write_qwen4_exp, write_qwen4exp_gguf, write_small_v41
from safetensors import safe_open
from test_convert import FAMILIES, fp8
from tiny import write_checkpoint

from engram.builders.checkpoint import MANIFEST
from engram.cli.main import main
from engram.quantize.convert import ConvertConfig, convert
from engram.quantize.export import ds4, safetensors, vllm
from engram.quantize.export import gguf as llama
from engram.quantize.export.target import ExportError, TargetConfig, open_converted
from engram.quantize.extent_table import ExtentTable
from engram.quantize.package import ExportConfig, export_package, open_package
from engram.quantize.row_store import RowStoreError

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tables too are streamed in several blocks."""
    monkeypatch.setattr("engram.quantize.mapped._READ_PAGES", 2)
    monkeypatch.setattr("engram.quantize.extent_table._CHUNK", 5000)


def packed(source: Path, **choices: Any) -> Path:
    """The package of a checkpoint, beside it."""
    package = source.with_name(source.name + "-package")
    convert(ConvertConfig(source, package, **choices))
    return package


def described(package: Path) -> tuple[Any, Any, Any]:
    """What must be the same in packages of the same memory."""
    manifest = json.loads((package / MANIFEST).read_bytes())
    return manifest["tables"], manifest["layout"], manifest["origin"]["published"]


def tensors_in(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor, by the stock library's view of the header."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == header.keys() - {"__metadata__"}
        found[path.name] = "", [], str(header.pop("__metadata__", None)).encode()
        for name, entry in header.items():
            begin, end = (8 + length + at for at in entry["data_offsets"])
            found[name] = entry["dtype"], entry["shape"], data[begin:end]
    return found


# safetensors


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in place"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_layout_comes_back(tmp_path: Path, family: str, in_place: bool) -> None:
    """Every tensor of the memory as it was, and a package of the result is the package of the source."""
    FAMILIES[family][0](tmp_path / "m")
    package = packed(tmp_path / "m", in_place=in_place)
    told = safetensors.export(TargetConfig(package, tmp_path / "out"))
    there, here = tensors_in(tmp_path / "m"), tensors_in(tmp_path / "out")
    published = json.loads((package / MANIFEST).read_bytes())["origin"]["published"]
    names = {tensor["name"] for table in published["tables"].values() for tensor in table} | set(published["dense"])
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert here == {name: there[name] for name in names | files}
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "m" / "config.json").read_bytes()
    for name in told["whole"]:
        digests = [hashlib.sha256((tmp_path / side / name).read_bytes()).hexdigest() for side in ("m", "out")]
        assert digests[0] == digests[1]
    assert bool(told["whole"]) == (family == "deepseek_v41")
    assert told["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert told["files"] == len(list((tmp_path / "out").iterdir()))
    convert(ConvertConfig(tmp_path / "m", tmp_path / "first"))
    convert(ConvertConfig(tmp_path / "out", tmp_path / "second"))
    assert described(tmp_path / "first") == described(tmp_path / "second")


def test_the_index_names_what_is_written(tmp_path: Path) -> None:
    write_small_v41(tmp_path / "m")
    safetensors.export(TargetConfig(packed(tmp_path / "m"), tmp_path / "out"))
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())["weight_map"]
    whole = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_bytes())["weight_map"]
    assert weight_map == {name: file for name, file in whole.items() if name != "model.norm.weight"}
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_rows_in_another_codec_are_not_the_published_ones(tmp_path: Path) -> None:
    write_qwen4_exp(tmp_path / "m")
    package = packed(tmp_path / "m", tables="bf16")
    with pytest.raises(ExportError, match="layer 1: rows of codec 'bf16', width 16, do not fit: .* was F32"):
        safetensors.export(TargetConfig(package, tmp_path / "out"))


def test_fp8_rows_with_another_factor_are_not_the_published_ones(tmp_path: Path) -> None:
    fp8(tmp_path / "m")
    package = packed(tmp_path / "m", tables="fp8-tensor:3c23d70b")
    with pytest.raises(ExportError, match="'fp8-tensor:3c23d70b', width 16, do not fit: .* is 'fp8-tensor:3c23d70a'"):
        safetensors.export(TargetConfig(package, tmp_path / "out"))


def test_a_gguf_has_no_published_layout(tmp_path: Path) -> None:
    write_qwen4exp_gguf(tmp_path / "m.gguf")
    package = packed(tmp_path / "m.gguf")
    with pytest.raises(ExportError, match="was converted from a gguf, which has no config.json"):
        safetensors.export(TargetConfig(package, tmp_path / "out"))


def test_a_package_with_a_backbone_is_not_published(tmp_path: Path) -> None:
    package = tmp_path / "package"
    export_package(ExportConfig(write_checkpoint(tmp_path / "tiny"), package))
    for target in (safetensors, llama, vllm, ds4):
        with pytest.raises(ExportError, match="has a backbone of its own .* the dialect 'demo'"):
            target.export(TargetConfig(package, tmp_path / "out.gguf"))


def test_a_damaged_row_is_not_exported(tmp_path: Path) -> None:
    """Nothing is left of what was written before it was met."""
    write_small_v41(tmp_path / "m", layers=(1, 14), heads=8, orders=3, width=256)
    package = packed(tmp_path / "m")
    table = package / "tables" / json.loads((package / MANIFEST).read_bytes())["tables"]["14"]["file"].split("/")[-1]
    data = bytearray(table.read_bytes())
    data[len(data) // 2] ^= 1
    table.write_bytes(bytes(data))
    before = sorted(tmp_path.iterdir())
    for target, out in ((safetensors, "out"), (ds4, "out.gguf")):
        with pytest.raises(RowStoreError, match="layer 14.* is damaged"):
            target.export(TargetConfig(package, tmp_path / out))
        assert sorted(tmp_path.iterdir()) == before


def test_a_header_that_says_otherwise_is_refused(tmp_path: Path) -> None:
    write_small_v41(tmp_path / "m")
    package = packed(tmp_path / "m")
    header = package / "source" / "model-00001-of-00003.safetensors.header"
    source = safetensors._shard
    wanted = {"model.layers.1.engram.q_weight": ("F32", (16, 2))}
    with pytest.raises(ExportError, match=r"'model.layers.1.engram.q_weight' is \('F32', \(2, 16\)\)"):
        source(header.parent, "model-00001-of-00003.safetensors", wanted)
    whole = header.read_bytes()
    entries = json.loads(whole[8:])
    entries["model.layers.1.engram.q_weight"]["data_offsets"][1] += 4
    header.write_bytes(whole[:8] + json.dumps(entries).encode())
    with pytest.raises(ExportError, match="says that 'model.layers.1.engram.q_weight'"):
        source(header.parent, "model-00001-of-00003.safetensors", {"model.layers.1.engram.q_weight": ("F32", (2, 16))})
    header.write_bytes(whole[:-9])
    with pytest.raises(ExportError, match="is no header of a shard"):
        source(header.parent, "model-00001-of-00003.safetensors", wanted)
    with pytest.raises(ExportError, match="'../x', which is no plain file name"):
        source(header.parent, "../x", wanted)


def test_a_manifest_that_does_not_say_where_rows_were_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    write_small_v41(tmp_path / "m")
    package = packed(tmp_path / "m")
    monkeypatch.setattr("engram.quantize.export.target._places", lambda *_: {}["part"])
    with pytest.raises(ExportError, match="does not say where the rows were published: KeyError"):
        safetensors.export(TargetConfig(package, tmp_path / "out"))


def test_dense_tensors_must_be_there(tmp_path: Path) -> None:
    write_small_v41(tmp_path / "m")
    with open_converted(packed(tmp_path / "m")) as held, pytest.raises(ExportError, match="lacks 'model.layers.1"):
        safetensors._plan(held, {})


def test_several_codecs_are_read_by_nobody_else(tmp_path: Path, monkeypatch: Any) -> None:
    write_small_v41(tmp_path / "m")
    package = packed(tmp_path / "m")
    monkeypatch.setattr("engram.quantize.export.target.PagedTable", ExtentTable)
    with pytest.raises(ExportError, match="layer [13] of .* has rows of several codecs"):
        safetensors.export(TargetConfig(package, tmp_path / "out"))


@pytest.mark.parametrize("target", [safetensors, vllm], ids=["safetensors", "vllm"])
def test_a_folder_that_is_not_ours_is_not_replaced(tmp_path: Path, target: Any) -> None:
    write_small_v41(tmp_path / "m")
    package = packed(tmp_path / "m")
    with pytest.raises(ExportError, match="m exists"):
        target.export(TargetConfig(package, tmp_path / "m"))
    with pytest.raises(ExportError, match="m is not an engram folder, --force does not replace it"):
        target.export(TargetConfig(package, tmp_path / "m", force=True))


# vllm


def rename(folder: Path) -> None:
    """The names of the published checkpoint, whose text model is a part."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    renamed = {"model.language_" + name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    save_file(renamed, folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_vllm_maps_the_table(tmp_path: Path, kind: str) -> None:
    rows = fp8(tmp_path / "m")[1] if kind == "fp8" else None
    if rows is None:
        write_qwen4_exp(tmp_path / "m")
    rename(tmp_path / "m")
    package = packed(tmp_path / "m", **({} if kind == "fp8" else {"tables": "bf16"}))
    vllm.export(TargetConfig(package, tmp_path / "out"))
    name = "language_model.model.layers.1.ple.ple_embedding.ngram_embedding.weight"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{name}.bin", f"{name}.done.json"]
    said = json.loads((tmp_path / "out" / f"{name}.done.json").read_bytes())
    assert said == {"shape": [4064, 16], "dtype": "torch.bfloat16" if kind == "bf16" else "torch.float8_e4m3fn"}
    if rows is None:
        with open_package(package) as opened:
            table: Any = opened.layers[1]
            rows = table.gather(np.arange(4064))
    assert (tmp_path / "out" / f"{name}.bin").read_bytes() == rows.tobytes()


def test_what_vllm_cannot_map(tmp_path: Path) -> None:
    write_small_v41(tmp_path / "v41")
    with pytest.raises(ExportError, match="56757, closed.* whose fields are not known"):
        vllm.export(TargetConfig(packed(tmp_path / "v41"), tmp_path / "out"))
    write_longcat(tmp_path / "longcat")
    with pytest.raises(ExportError, match="family longcat_flash_ngram, vLLM maps tables of qwen4_exp"):
        vllm.export(TargetConfig(packed(tmp_path / "longcat"), tmp_path / "out"))
    write_qwen4_exp(tmp_path / "m")
    with pytest.raises(ExportError, match="known of names that begin with model.language_model."):
        vllm.export(TargetConfig(packed(tmp_path / "m", tables="bf16"), tmp_path / "out"))
    rename(tmp_path / "m")
    convert(ConvertConfig(tmp_path / "m", tmp_path / "floats"))
    with pytest.raises(ExportError, match="layer 1: rows of codec 'f32', width 16, do not fit: vLLM maps rows of BF16"):
        vllm.export(TargetConfig(tmp_path / "floats", tmp_path / "out"))


# the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_qwen4_exp(tmp_path / "m")
    package = packed(tmp_path / "m")
    capsys.readouterr()
    for name, out in (("safetensors", "out"), ("gguf", "out.gguf")):
        with pytest.raises(SystemExit) as leaving:
            main(["export", str(package), "--format", name, "--out", str(tmp_path / out), "--json"])
        assert leaving.value.code == 0
        told = json.loads(capsys.readouterr().out)
        assert told["format"] == name and told["out"] == str(tmp_path / out)
        assert told["files"] >= 1 and told["bytes"] > 0 and told["seconds"] > 0
    with pytest.raises(SystemExit):
        main(["export", str(package), "--format", "vllm", "--backbone", "x.gguf", "--out", str(tmp_path / "v")])
    assert "--backbone x.gguf is of no use to --format vllm" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(package), "--format", "vllm", "--reference-backbone", "--out", str(tmp_path / "v")])
    assert "--reference-backbone is of no use to --format vllm" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "m"), "--format", "vllm", "--out", str(tmp_path / "v")])
    assert "m is no package: it holds no engram.json" in (said := capsys.readouterr().err) and "engram convert" in said
