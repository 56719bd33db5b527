"""GGUF backbones through llama.cpp: types as the gguf package reads them back; the importance matrix."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType as Types
from gguf_llama import BLOCKS, INNER, LINEAR, VOCAB, WIDTH, write_gguf

from engram.builders.backbone import BackboneRef, load_backbone
from engram.builders.gguf_header import GgufHeaderError, read_tensors
from engram.quantize.backbone import BackboneConfig, QuantizeBackboneError, quantize_backbone
from engram.quantize.backbone_gguf import gguf_types
from engram.quantize.backbone_imatrix import (
    Collector,
    Importance,
    ImportanceError,
    read_importance,
    write_importance,
)

try:
    import llama_cpp  # noqa: F401

    COMPILED = True
except ImportError:
    COMPILED = False
compiled = pytest.mark.skipif(not COMPILED, reason="llama-cpp-python is not installed (make gguf)")
IDS = torch.arange(48).reshape(2, 24) * 5 % VOCAB


@pytest.fixture
def source(tmp_path: Path) -> BackboneRef:
    return BackboneRef.find(str(write_gguf(tmp_path / "float.gguf")))


def quantized(source: BackboneRef, out: Path, kind: str, **more: Any) -> tuple[dict[str, Any], BackboneRef]:
    return quantize_backbone(BackboneConfig(source, Path(), out, kind, **more))


def read_back(folder: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(folder / "backbone" / "model.gguf").tensors}


@compiled
@pytest.mark.parametrize(
    ("kind", "most"),
    [("q8_0", "Q8_0"), ("q4_0", "Q4_0"), ("q5_1", "Q5_1"), ("q4_k_m", "Q4_K"), ("q6_k", "Q6_K"), ("iq4_nl", "IQ4_NL"),
     ("q3_k_s", "Q3_K"), ("tq2_0", "TQ2_0")],
)  # fmt: skip
def test_the_written_types_are_reported(source: BackboneRef, tmp_path: Path, kind: str, most: str) -> None:
    report, made = quantized(source, tmp_path, kind)
    found = read_back(tmp_path)
    assert report["modules"] | report["left"] == found
    assert found["blk.0.ffn_up.weight"] == most
    assert {kind for name, kind in found.items() if "norm" in name} == {"F32"}
    assert report["type"] == kind and report["requantized"] == {}
    assert report["bytes"] == (tmp_path / "backbone" / "model.gguf").stat().st_size < report["bytes_before"]
    made.verify(tmp_path)


@compiled
def test_q8_0_is_bytewise_that_of_the_gguf_package_and_loads(source: BackboneRef, tmp_path: Path) -> None:
    _, made = quantized(source, tmp_path, "q8_0")
    before = {t.name: t for t in gguf.GGUFReader(source.path).tensors}
    for tensor in gguf.GGUFReader(tmp_path / "backbone" / "model.gguf").tensors:
        if tensor.tensor_type == Types.Q8_0:
            assert np.array_equal(tensor.data, gguf.quants.quantize(before[tensor.name].data, Types.Q8_0))
    with torch.inference_mode():
        float_logits = load_backbone(source)(IDS).logits
        found = load_backbone(made, tmp_path)(IDS).logits
    assert not torch.equal(found, float_logits)
    assert (found - float_logits).norm() < 0.03 * float_logits.norm()


@compiled
def test_the_first_pattern_that_matches_counts(source: BackboneRef, tmp_path: Path) -> None:
    report, _ = quantized(
        source, tmp_path, "q4_0", tensor_types=((r"blk\.1\.ffn_down", "q6_k"), ("ffn_down", "q8_0"), ("attn_v", "f16")),
        embedding_type="q5_0", output_type="q6_k",
    )  # fmt: skip
    found = read_back(tmp_path)
    assert found["blk.0.ffn_down.weight"] == "Q8_0"
    assert found["blk.1.ffn_down.weight"] == "Q6_K"
    assert found["blk.0.attn_v.weight"] == "F16"
    assert "blk.0.attn_v.weight" in report["left"]
    assert (found["token_embd.weight"], found["output.weight"]) == ("Q5_0", "Q6_K")
    assert found["blk.0.ffn_up.weight"] == "Q4_0"


@compiled
def test_a_quantized_source_needs_a_word(tmp_path: Path) -> None:
    source = BackboneRef.find(str(write_gguf(tmp_path / "q8.gguf", kind=Types.Q8_0)))
    with pytest.raises(QuantizeBackboneError, match="16 tensors Q8_0") as caught:
        quantized(source, tmp_path, "q4_0")
    assert "--requantize" in caught.value.hint
    report, _ = quantized(source, tmp_path, "q4_0", requantize=True)
    assert report["requantized"] == {"Q8_0": 16}


@compiled
def test_importance_weighs_columns(source: BackboneRef, tmp_path: Path) -> None:
    """With one heavy input a column, its error must fall below what it is without the matrix."""
    heavy = np.full(WIDTH, 1e-3, dtype=np.float32)
    heavy[::32] = 1.0
    write_importance(tmp_path / "i.gguf", Importance({"blk.0.attn_q.weight": heavy}), ["none"])
    quantized(source, tmp_path / "plain", "iq4_nl")
    report, _ = quantized(source, tmp_path / "weighted", "iq4_nl", importance=tmp_path / "i.gguf")
    assert (report["importance"], report["importance_tensors"]) == (str(tmp_path / "i.gguf"), 1)
    true = next(t.data for t in gguf.GGUFReader(source.path).tensors if t.name == "blk.0.attn_q.weight")
    error = {}
    for way in ("plain", "weighted"):
        tensors = gguf.GGUFReader(tmp_path / way / "backbone" / "model.gguf").tensors
        found = next(t for t in tensors if t.name == "blk.0.attn_q.weight")
        back = gguf.quants.dequantize(found.data, found.tensor_type)
        error[way] = float(np.square(back - true)[:, ::32].mean())
    assert error["weighted"] < 0.5 * error["plain"]


@compiled
def test_very_few_bits_need_the_matrix(source: BackboneRef, tmp_path: Path) -> None:
    with pytest.raises(QuantizeBackboneError, match="imatrix") as caught:
        quantized(source, tmp_path, "iq2_xxs")
    assert "importance matrix" in caught.value.hint
    collected = collect(source)
    write_importance(tmp_path / "i.gguf", collected, ["test"])
    quantized(source, tmp_path, "iq2_xxs", importance=tmp_path / "i.gguf")
    assert "IQ2_XXS" in read_back(tmp_path).values()


def collect(source: BackboneRef) -> Importance:
    model = load_backbone(source)
    with Collector(model) as collector, torch.inference_mode():
        model(IDS[:1])
        model(IDS[1:])
    assert not any(module._forward_pre_hooks for module in model.modules())
    return collector.importance(Path(source.path))


def test_the_collector_means_squared_inputs(source: BackboneRef) -> None:
    """The first block's inputs follow from embedding and norm alone, computed here by numpy from the file."""
    importance = collect(source)
    names = {f"blk.{n}.{name}.weight" for n in range(BLOCKS) for name in LINEAR} | {"output.weight"}
    assert importance.means.keys() == names
    embedding = next(t.data for t in gguf.GGUFReader(source.path).tensors if t.name == "token_embd.weight")
    rows = np.asarray(embedding, dtype=np.float64)[IDS.ravel().numpy()]
    normed = rows / np.sqrt(np.square(rows).mean(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(importance.means["blk.0.attn_q.weight"], np.square(normed).mean(axis=0), rtol=1e-4)
    assert importance.counts["blk.1.ffn_down.weight"] == IDS.numel()


def test_the_matrix_file_is_llama_cpps(source: BackboneRef, tmp_path: Path) -> None:
    importance = collect(source)
    write_importance(tmp_path / "i.gguf", importance, ["a.jsonl", "b.txt"])
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    tensors = {t.name: t for t in reader.tensors}
    name = "blk.0.ffn_down.weight"
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a.jsonl", "b.txt"]
    assert "general.architecture" not in reader.fields
    assert list(tensors[f"{name}.in_sum2"].shape) == [INNER, 1]
    assert tensors[f"{name}.counts"].data.ravel().tolist() == [IDS.numel()]
    again = read_importance(tmp_path / "i.gguf")
    assert again.counts == importance.counts
    for key, means in importance.means.items():
        np.testing.assert_allclose(again.means[key], means, rtol=1e-6)


def test_tensors_are_listed_as_the_gguf_package_lists_them(source: BackboneRef) -> None:
    expected = {t.name: (tuple(map(int, t.shape)), int(t.tensor_type)) for t in gguf.GGUFReader(source.path).tensors}
    assert read_tensors(Path(source.path)) == expected


# Errors


@pytest.mark.parametrize(("value", "message"), [(1 << 40, "claims"), (1 << 15, "end of the file")])
def test_a_lying_tensor_count_is_refused(source: BackboneRef, tmp_path: Path, value: int, message: str) -> None:
    data = bytearray(Path(source.path).read_bytes()[:20000])
    data[8:16] = value.to_bytes(8, "little")
    (tmp_path / "lie.gguf").write_bytes(data)
    with pytest.raises(GgufHeaderError, match=message):
        read_tensors(tmp_path / "lie.gguf")


def test_too_many_dimensions_are_refused(source: BackboneRef, tmp_path: Path) -> None:
    data = bytearray(Path(source.path).read_bytes())
    place = data.index(b"token_embd.weight") + len(b"token_embd.weight")
    data[place : place + 4] = (5).to_bytes(4, "little")
    (tmp_path / "lie.gguf").write_bytes(data)
    with pytest.raises(GgufHeaderError, match="claims 5 dimensions"):
        read_tensors(tmp_path / "lie.gguf")


def test_missing_llama_cpp_is_named(source: BackboneRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(QuantizeBackboneError, match="llama-cpp-python") as caught:
        quantized(source, tmp_path, "q4_0")
    assert "make gguf" in caught.value.hint


@compiled
def test_a_transformers_folder_is_refused(tmp_path: Path) -> None:
    source = BackboneRef.find(str(tiny.write_backbone(tmp_path / "float", 300)))
    with pytest.raises(QuantizeBackboneError, match="is no GGUF file") as caught:
        quantized(source, tmp_path, "q4_0")
    assert "convert_hf_to_gguf" in caught.value.hint


@compiled
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kind": "q9_9"}, "'q9_9' is not known"),
        ({"embedding_type": "q4_k_m"}, "embedding_type 'q4_k_m' is not known"),
        ({"tensor_types": (("attn_q", "int8"),)}, "'int8' is not known"),
        ({"tensor_types": (("attn_z", "q8_0"),)}, "matches no tensor"),
        ({"tensor_types": (("(", "q8_0"),)}, "is no regular expression"),
        ({"tensor_types": (("(?P<a>attn_q)", "q8_0"),)}, "regular expression"),
    ],
)
def test_unknown_types_and_patterns_are_refused(
    source: BackboneRef, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(QuantizeBackboneError) as caught:
        quantized(source, tmp_path, **({"kind": "q4_0"} | more))
    assert message in str(caught.value)
    if "kind" in more:
        assert {"q4_k_m", "iq4_nl", "bf16"} <= gguf_types().keys()
        assert "q4_k_m" in caught.value.hint


@compiled
def test_a_matrix_of_another_backbone_is_refused(source: BackboneRef, tmp_path: Path) -> None:
    short, other = np.ones(7, dtype=np.float32), np.ones(WIDTH, dtype=np.float32)
    write_importance(tmp_path / "short.gguf", Importance({"blk.0.attn_q.weight": short}), [])
    with pytest.raises(QuantizeBackboneError, match="has 7 values, the tensor 256"):
        quantized(source, tmp_path, "q4_0", importance=tmp_path / "short.gguf")
    write_importance(tmp_path / "other.gguf", Importance({"blk.0.attn_z.weight": other}), [])
    with pytest.raises(QuantizeBackboneError, match="names no tensor"):
        quantized(source, tmp_path, "q4_0", importance=tmp_path / "other.gguf")


def test_a_broken_matrix_is_refused(source: BackboneRef, tmp_path: Path) -> None:
    bad = np.array([1, np.nan], dtype=np.float32)
    write_importance(tmp_path / "nan.gguf", Importance({"x.weight": bad}), [])
    with pytest.raises(ImportanceError, match="not finite"):
        read_importance(tmp_path / "nan.gguf")
    write_importance(tmp_path / "none.gguf", Importance({}), [])
    with pytest.raises(ImportanceError, match="holds no tensor"):
        read_importance(tmp_path / "none.gguf")
    with pytest.raises(ImportanceError, match="no importance matrix"):
        read_importance(Path(source.path))
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "nan.gguf").read_bytes()[:90])
    with pytest.raises(ImportanceError, match="cannot be read"):
        read_importance(tmp_path / "cut.gguf")


def test_nothing_counted_is_an_error(source: BackboneRef) -> None:
    with pytest.raises(ImportanceError, match="nothing was counted"):
        Collector(load_backbone(source)).importance(Path(source.path))


def test_an_architecture_without_names_is_an_error(source: BackboneRef, tmp_path: Path) -> None:
    model = load_backbone(source)
    with Collector(model) as collector, torch.inference_mode():
        model(IDS)
    with pytest.raises(ImportanceError, match="'nonesuch'"):
        collector.importance(write_gguf(tmp_path / "other.gguf", architecture="nonesuch"))
