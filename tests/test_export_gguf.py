"""`engram export --format gguf` and `ds4`: tables in another engine's file, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from published import write_gemma, write_longcat, write_qwen4_exp, write_qwen4exp_gguf, write_small_v41
from test_export_formats import described, packed, small_blocks  # noqa: F401 (a fixture)

from engram import Progress
from engram.builders.gguf_header import GgufHeaderError, read_metadata, read_pairs
from engram.builders.layout import Layout
from engram.builders.tensor_files import open_files
from engram.kernels.codecs import find_codec
from engram.quantize.convert import ConvertConfig, convert
from engram.quantize.export import ds4
from engram.quantize.export import gguf as llama
from engram.quantize.export.gguf_file import Entry, write_gguf
from engram.quantize.export.target import ExportError, TargetConfig
from engram.quantize.package import open_package

TABLE = "per_layer_token_embd.weight"
KINDS = ("F32", "BF16", "Q8_0", "Q4_0", "IQ4_NL")
pytestmark = pytest.mark.usefixtures("small_blocks")


# gguf


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_gets_the_table(tmp_path: Path, kind: str) -> None:
    """The table and the hash's constants are the package's, every other tensor and key the backbone's."""
    stored = write_qwen4exp_gguf(tmp_path / "m.gguf", kind, layer_multipliers=[1 << 30, 21, 23])
    write_qwen4exp_gguf(tmp_path / "base.gguf", "Q8_0", eos_token_id=8)
    told = llama.export(TargetConfig(packed(tmp_path / "m.gguf"), tmp_path / "out.gguf", tmp_path / "base.gguf"))
    assert told["bytes"] == (tmp_path / "out.gguf").stat().st_size and told["type"] == kind
    base, out = gguf.GGUFReader(tmp_path / "base.gguf"), gguf.GGUFReader(tmp_path / "out.gguf")
    assert [tensor.name for tensor in out.tensors] == [tensor.name for tensor in base.tensors]
    for theirs, ours in zip(base.tensors, out.tensors, strict=True):
        data = stored if ours.name == TABLE else theirs.data
        assert ours.data.tobytes() == data.tobytes()
        assert ours.tensor_type == (gguf.GGMLQuantizationType[kind] if ours.name == TABLE else theirs.tensor_type)
    values = {key: field.contents() for key, field in out.fields.items() if not key.startswith("GGUF.")}
    expected = {key: field.contents() for key, field in base.fields.items() if not key.startswith("GGUF.")}
    assert values.pop("engram.release") and values.pop("general.alignment") == 32
    assert values == expected | {"qwen4exp.ple.layer_multipliers": [1 << 30, 21, 23], "qwen4exp.ple.eos_token_id": 9}
    kinds = {name: out.fields[f"qwen4exp.ple.{name}"].types[-1].name for name in ("layer_multipliers", "head_offsets")}
    assert kinds == {"layer_multipliers": "UINT64", "head_offsets": "UINT64"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_alone_can_be_converted(tmp_path: Path, kind: str) -> None:
    write_qwen4exp_gguf(tmp_path / "m.gguf", kind)
    package = packed(tmp_path / "m.gguf")
    told = llama.export(TargetConfig(package, tmp_path / "out.gguf"))
    assert told["backbone"] is None
    assert [tensor.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors] == [TABLE]
    assert described(packed(tmp_path / "out.gguf"))[:2] == described(package)[:2]


def test_a_checkpoint_becomes_a_table(tmp_path: Path) -> None:
    """From safetensors, in another codec: the same constants and rows in a GGUF."""
    write_qwen4_exp(tmp_path / "m")
    package = packed(tmp_path / "m", tables="bf16")
    llama.export(TargetConfig(package, tmp_path / "out.gguf"))
    assert gguf.GGUFReader(tmp_path / "out.gguf").fields["qwen4exp.ple.conv_kernel"].contents() == 4
    again = packed(tmp_path / "out.gguf")
    with open_package(package) as first, open_package(again) as second:
        ids = np.random.default_rng(0).integers(0, 512, (2, 40))
        assert np.array_equal(first.layout.rows(ids)[1], second.layout.rows(ids)[1])
    assert described(package)[0] == described(again)[0]


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gathers_our_rows(tmp_path: Path, kind: str, lazy: bool) -> None:
    """The model with our table in it loads, and its memory is ours bit for bit, over a prompt and token by token."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make gguf)")
    from llama_rows import has_qwen4exp, rows_of, write_model

    if not has_qwen4exp():
        pytest.skip("this llama.cpp has no qwen4exp")
    choices: dict[str, Any] = dict(
        dialect="qwen-ple", orders=(2, 3), heads=2, head_dim=64, layers=(0,), rows_per_head=500, pad_id=1,
        vocab_size=512, reset_id=1,
    )  # fmt: skip
    write_model(tmp_path / "base.gguf", Layout.build(**choices, seed=1))
    layout = Layout.build(**choices, seed=7)
    sizes = [prime for heads in layout.primes[0] for prime in heads]
    source = tmp_path / "table.gguf"
    write_table(source, kind, layout, sizes)
    package = packed(source)
    llama.export(TargetConfig(package, tmp_path / "model.gguf", tmp_path / "base.gguf"))
    ids = np.random.default_rng(3).integers(0, 512, 60)
    ids[[5, 41]] = 1
    with open_package(package) as opened, rows_of(tmp_path / "model.gguf", layout, lazy) as theirs:
        rows = opened.layout.rows(ids[None])[0][0]
        table: Any = opened.layers[0]
        ours = find_codec(table.codec_name).decode(table.gather(rows.reshape(-1)), 64).reshape(*rows.shape, 64)
        seen = [theirs.memory(ids[:40]), *(theirs.memory(ids[i : i + 1]) for i in range(40, 60))]
    assert np.array_equal(np.concatenate(seen).view(np.uint32), ours.view(np.uint32))
    assert not np.array_equal(ours, np.zeros_like(ours))


def write_table(path: Path, kind: str, layout: Layout, sizes: list[int]) -> None:
    """A GGUF of random rows for a layout; row 0 of every block of 32 values holds a large one."""
    writer = gguf.GGUFWriter(path, "qwen4exp")
    writer.add_vocab_size(layout.vocab_size)
    writer.add_embedding_length_per_layer_input(layout.head_dim)
    for name, number in (("ngram_size", layout.orders[-1]), ("heads_per_ngram", layout.heads), ("eos_token_id", 1)):
        writer.add_uint32(f"qwen4exp.ple.{name}", number)
    for name, values in (("layers", layout.layers), ("layer_multipliers", layout.multipliers[0]),
                         ("head_vocab_sizes", sizes), ("head_offsets", layout.offsets(0).tolist())):  # fmt: skip
        writer.add_key_value(
            f"qwen4exp.ple.{name}", list(values), gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.UINT64
        )
    rows = np.random.default_rng(5).normal(size=(sum(sizes), layout.head_dim)).astype(np.float32)
    dtype = gguf.GGMLQuantizationType[kind]
    data = find_codec(kind.lower()).encode(rows) if kind == "IQ4_NL" else gguf.quants.quantize(rows, dtype)
    writer.add_tensor(TABLE, data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gemma_gguf(
    path: Path, shape: tuple[int, int] = (400, 40), each: int = 8, architecture: str = "gemma4"
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(5)
    writer.add_embedding_length_per_layer_input(each)
    writer.add_tensor("output_norm.weight", np.arange(8, dtype=np.float32))
    writer.add_tensor(TABLE, np.zeros(shape, np.float16))
    writer.add_tensor("last.weight", np.arange(8, dtype=np.float32) + 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gemma_gets_its_table_back(tmp_path: Path) -> None:
    weight = write_gemma(tmp_path / "m", "gemma4").model.embed_tokens_per_layer.weight.detach().numpy()
    write_gemma_gguf(tmp_path / "base.gguf")
    package = packed(tmp_path / "m")
    llama.export(TargetConfig(package, tmp_path / "out.gguf", tmp_path / "base.gguf"))
    first, table, last = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    assert (table.name, table.data.shape) == (TABLE, (400, 40)) and np.array_equal(table.data, weight)
    assert np.array_equal(first.data, np.arange(8)) and np.array_equal(last.data, np.arange(8) + 8)
    with pytest.raises(ExportError, match="nothing but a table makes no GGUF"):
        llama.export(TargetConfig(package, tmp_path / "alone.gguf"))
    write_gemma_gguf(tmp_path / "base.gguf", (512, 40))
    with pytest.raises(ExportError, match=r"is \[512, 40\], 8 for each layer; the package's is \[400, 40\], 8 for"):
        llama.export(TargetConfig(package, tmp_path / "other.gguf", tmp_path / "base.gguf"))
    write_gemma_gguf(tmp_path / "base.gguf", architecture="llama")
    with pytest.raises(ExportError, match="is of the architecture 'llama', not gemma3n or gemma4"):
        llama.export(TargetConfig(package, tmp_path / "other.gguf", tmp_path / "base.gguf"))


def test_what_llama_cpp_cannot_hold(tmp_path: Path) -> None:
    write_small_v41(tmp_path / "v41")
    write_longcat(tmp_path / "longcat")
    for name, reason in (("v41", "deepseek41 is an open pull request"), ("longcat", "has no architecture for it")):
        with pytest.raises(ExportError, match=reason):
            llama.export(TargetConfig(packed(tmp_path / name), tmp_path / "out.gguf"))
    write_qwen4_exp(tmp_path / "m")
    package = packed(tmp_path / "m", tables="nf4")
    with pytest.raises(
        ExportError, match="layer 1: rows of codec 'nf4', width 16, do not fit: llama.cpp reads"
    ) as wrong:
        llama.export(TargetConfig(package, tmp_path / "out.gguf"))
    assert "--tables bf16, q8_0, q4_0 or iq4_nl" in wrong.value.hint


def test_a_backbone_of_another_model_is_refused(tmp_path: Path) -> None:
    write_qwen4exp_gguf(tmp_path / "m.gguf")
    package, base = packed(tmp_path / "m.gguf"), tmp_path / "base.gguf"
    write_qwen4exp_gguf(base, layers=[2])
    with pytest.raises(ExportError, match=r"qwen4exp.ple.layers is \(2,\), the package has \(1,\)"):
        llama.export(TargetConfig(package, tmp_path / "out.gguf", base))
    write_qwen4exp_gguf(base, heads_per_ngram=4)
    with pytest.raises(ExportError, match="qwen4exp.ple.heads_per_ngram is 4, the package has 2"):
        llama.export(TargetConfig(package, tmp_path / "out.gguf", base))
    write_gemma_gguf(base)
    with pytest.raises(ExportError, match="is of the architecture 'gemma4', qwen4_exp is 'qwen4exp'"):
        llama.export(TargetConfig(package, tmp_path / "out.gguf", base))
    with pytest.raises(ExportError, match="model.safetensors is no GGUF"):
        llama.export(TargetConfig(package, tmp_path / "out.gguf", tmp_path / "model.safetensors"))


def test_a_part_of_a_gguf_is_no_backbone(tmp_path: Path) -> None:
    write_qwen4exp_gguf(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "qwen4exp")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("x", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ExportError, match="part.gguf is one of 3 parts"):
        llama.export(TargetConfig(packed(tmp_path / "m.gguf"), tmp_path / "out.gguf", tmp_path / "part.gguf"))


def test_a_gguf_has_one_table(tmp_path: Path, monkeypatch: Any) -> None:
    write_small_v41(tmp_path / "m")
    monkeypatch.setattr(llama, "REASONS", {})
    with pytest.raises(ExportError, match=r"has the tables of layers \[1, 3\], a GGUF holds one"):
        llama.export(TargetConfig(packed(tmp_path / "m"), tmp_path / "out.gguf"))


def test_what_a_gguf_may_replace(tmp_path: Path) -> None:
    write_qwen4exp_gguf(tmp_path / "m.gguf")
    write_qwen4exp_gguf(tmp_path / "base.gguf")
    package, out = packed(tmp_path / "m.gguf"), tmp_path / "out.gguf"
    llama.export(TargetConfig(package, out))
    with pytest.raises(ExportError, match="out.gguf exists"):
        llama.export(TargetConfig(package, out))
    llama.export(TargetConfig(package, out, tmp_path / "base.gguf", force=True))
    assert len(gguf.GGUFReader(out).tensors) == 2
    with pytest.raises(ExportError, match="base.gguf is no GGUF of engram, --force does not replace it"):
        llama.export(TargetConfig(package, tmp_path / "base.gguf", force=True))
    with pytest.raises(ExportError, match="out.gguf is the backbone that is read"):
        llama.export(TargetConfig(package, out, out, force=True))
    with pytest.raises(ExportError, match="is no name of a GGUF"):
        llama.export(TargetConfig(package, tmp_path / "folder"))


def test_the_pairs_of_a_gguf_are_copied_as_they_are(tmp_path: Path) -> None:
    write_qwen4exp_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    pairs = read_pairs(tmp_path / "m.gguf")
    assert data[24:].startswith(b"".join(pairs.values())) and pairs.keys() == read_metadata(tmp_path / "m.gguf").keys()
    twice = data[:16] + (len(pairs) + 1).to_bytes(8, "little") + pairs["general.architecture"] + data[24:]
    (tmp_path / "m.gguf").write_bytes(twice)
    with pytest.raises(GgufHeaderError, match="has the key 'general.architecture' twice"):
        read_pairs(tmp_path / "m.gguf")


def test_a_tensor_must_come_to_its_size(tmp_path: Path) -> None:
    """And what was written until then is gone."""
    tensor = Entry("x", "F32", (2, 3), lambda: iter([bytes(20)]))
    with pytest.raises(ExportError, match="tensor 'x' came to 20 bytes, not 24"):
        write_gguf(TargetConfig(tmp_path, tmp_path / "out.gguf"), {}, [tensor], 32, Progress())
    assert not list(tmp_path.iterdir())


# ds4


def v41_for_ds4(folder: Path) -> dict[str, Any]:
    return write_small_v41(folder, layers=(1, 14), heads=8, orders=3, width=256)


def read_ds4(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    for tensor in reader.tensors:
        assert tensor.data_offset % 16384 == 0
    return values, {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}


def test_ds4_reads_the_rows(tmp_path: Path) -> None:
    """Rows and values by what ds4's source says of its file: 256 codes, then 8 exponents, hashed by the keys alone."""
    arrays = v41_for_ds4(tmp_path / "m")
    package = packed(tmp_path / "m")
    told = ds4.export(TargetConfig(package, tmp_path / "out.gguf"))
    assert told["encoding"] == "e4m3_e8m0_32_row264" and told["bytes"] == (tmp_path / "out.gguf").stat().st_size
    values, tensors = read_ds4(tmp_path / "out.gguf")
    key = "deepseek41.engram."
    assert (values["general.architecture"], values[key + "encoding"]) == ("deepseek41", told["encoding"])
    assert values[key + "layer_ids"] == [1, 14] and values[key + "compressed_vocab_size"] == 9
    with open_package(package) as opened:
        ids = np.array([[0, 1, 2, 3, 9, 5, 7, 11, 4, 8]])
        for place, layer in enumerate((1, 14)):
            stored = tensors[f"blk.{layer}.engram_embd.weight"].view(np.uint8)
            codes, scales = arrays[layer]
            assert stored.shape == (values[key + "rows"][place], 264) and len(stored) == len(codes)
            assert np.array_equal(stored[:, :256], codes) and np.array_equal(stored[:, 256:], scales)
            primes = values[key + "primes"][place * 24 : place * 24 + 24]
            factors = values[key + "multipliers"][place * 4 : place * 4 + 4]
            tail = [values[key + "pad_id"]] * 3
            for t, raw in enumerate(ids[0]):
                window = [values[key + "token_map"][raw], *tail]
                mixed, start, rows = window[0] * factors[0], 0, []
                for j in range(1, 4):
                    mixed ^= window[j] * factors[j]
                    for head in range(8):
                        prime = primes[(j - 1) * 8 + head]
                        rows.append(mixed % prime + start)
                        start += prime
                tail = window[:3]
                assert opened.layout.rows(ids)[layer][0, t].tolist() == rows
            table: Any = opened.layers[layer]
            ours = find_codec("fp8-e8m0").decode(table.gather(np.arange(8)), 256)
            sign, exponent, fraction = stored[:8, :256] >> 7, (stored[:8, :256] >> 3) & 15, stored[:8, :256] & 7
            size = np.where(exponent, np.ldexp(fraction + 8.0, exponent.astype(int) - 10), np.ldexp(fraction * 1.0, -9))
            size = np.ldexp(size, stored[:8, 256:].repeat(32, axis=1).astype(int) - 127)
            assert np.array_equal(ours, np.where(sign, -size, size))


def write_ds4_backbone(
    path: Path, encoding: str | None = "lloyd4_e5m3_32_r136", layers: tuple[int, ...] = (1, 14)
) -> None:
    writer = gguf.GGUFWriter(path, "deepseek41")
    writer.add_custom_alignment(16384)
    if encoding is not None:
        writer.add_string("deepseek41.engram.encoding", encoding)
        writer.add_string("deepseek41.engram.storage", "external")
    writer.add_array("deepseek41.engram.layer_ids", list(layers))
    writer.add_uint32("deepseek41.hc_mult", 4)
    writer.add_tensor("first.weight", np.arange(5, dtype=np.float32))
    for layer in layers:
        writer.add_tensor(f"blk.{layer}.engram_embd.weight", np.zeros((3, 136), np.int8))
    writer.add_tensor("second.weight", np.arange(7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_ds4_gets_the_tables_last(tmp_path: Path) -> None:
    arrays = v41_for_ds4(tmp_path / "m")
    write_ds4_backbone(tmp_path / "base.gguf")
    ds4.export(TargetConfig(packed(tmp_path / "m"), tmp_path / "out.gguf", tmp_path / "base.gguf"))
    values, tensors = read_ds4(tmp_path / "out.gguf")
    tables = ["blk.1.engram_embd.weight", "blk.14.engram_embd.weight"]
    assert list(tensors) == ["first.weight", "second.weight", *tables]
    assert np.array_equal(tensors["second.weight"], np.arange(7)) and values["deepseek41.hc_mult"] == 4
    assert values["deepseek41.engram.encoding"] == "e4m3_e8m0_32_row264" and "deepseek41.engram.storage" not in values
    assert np.array_equal(tensors[tables[1]].view(np.uint8), np.concatenate(arrays[14], axis=1))


def test_what_ds4_cannot_hold(tmp_path: Path) -> None:
    write_longcat(tmp_path / "longcat")
    with pytest.raises(ExportError, match="is of the family longcat_flash_ngram, ds4 reads tables of deepseek_v41"):
        ds4.export(TargetConfig(packed(tmp_path / "longcat"), tmp_path / "out.gguf"))
    write_small_v41(tmp_path / "narrow")
    with pytest.raises(ExportError, match="layer 1: rows of codec 'fp8-e8m0', width 64, do not fit: ds4 reads"):
        ds4.export(TargetConfig(packed(tmp_path / "narrow"), tmp_path / "out.gguf"))
    write_small_v41(tmp_path / "few", heads=4, orders=3, width=256)
    with pytest.raises(ExportError, match=r"orders \[2, 3, 4\], 4 heads and 2 layers; ds4 has \[2, 3, 4\], 8 and 2"):
        ds4.export(TargetConfig(packed(tmp_path / "few"), tmp_path / "out.gguf"))


def test_ds4_reads_no_nan(tmp_path: Path) -> None:
    v41_for_ds4(tmp_path / "m")
    package = packed(tmp_path / "m", in_place=False)
    for name, byte, row in (("embed.weight", 0xFF, 7), ("embed.scale", 0xFF, 9)):
        tensor = open_files(tmp_path / "m").find(f"model.layers.14.engram.{name}")
        with tensor.file.open("r+b") as file:
            file.seek(tensor.offset + row * tensor.shape[1] + 3)
            kept = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte]))
        convert(ConvertConfig(tmp_path / "m", package, force=True))
        with pytest.raises(ExportError, match=f"layer 14: row {row} holds a NaN"):
            ds4.export(TargetConfig(package, tmp_path / "out.gguf"))
        assert not (tmp_path / "out.gguf").exists()
        with tensor.file.open("r+b") as file:
            file.seek(tensor.offset + row * tensor.shape[1] + 3)
            file.write(kept)


def test_a_backbone_that_ds4_did_not_make_is_refused(tmp_path: Path) -> None:
    v41_for_ds4(tmp_path / "m")
    package, base = packed(tmp_path / "m"), tmp_path / "base.gguf"
    write_ds4_backbone(base, encoding=None)
    with pytest.raises(ExportError, match="'deepseek41' and has no key deepseek41.engram.encoding: ds4 did not make"):
        ds4.export(TargetConfig(package, tmp_path / "out.gguf", base))
    write_ds4_backbone(base, layers=(1, 15))
    with pytest.raises(ExportError, match=r"has memory in the layers \[1, 15\], the package in \[1, 14\]"):
        ds4.export(TargetConfig(package, tmp_path / "out.gguf", base))
