"""What `engram quantize --backbone` refuses before it works, and what counts as the backbone at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType as Types
from gguf_llama import BLOCKS, VOCAB, WIDTH, write_gguf

import engram.builders.backbone as backbone_room
from engram.builders.backbone import BackboneError, BackboneRef, backbone_facts, load_backbone, save_backbone
from engram.builders.backbone_int import MARK
from engram.builders.corpus import CorpusConfig
from engram.quantize.backbone import BackboneConfig, QuantizeBackboneError, check_backbone, quantize_backbone
from engram.quantize.backbone_config import check_replacement
from engram.quantize.backbone_imatrix import Importance, ImportanceError, check_importance_target, write_importance
from engram.runtime.quantize_config import BackboneWish, QuantizeRun
from engram.runtime.quantize_run import quantize_run

TEXT = CorpusConfig(("nowhere.jsonl",))
MATRIX = Importance({"blk.0.attn_q.weight": np.ones(WIDTH, dtype=np.float32)})


def needs_torchao() -> None:
    pytest.importorskip("torchao", reason="the extra `torchao` is not installed")


def needs_llama_cpp() -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make gguf)")


# What is loaded


@pytest.mark.parametrize("kind", ["hf", "embedded"])
def test_a_stray_mark_does_not_change_what_is_loaded(tmp_path: Path, kind: str) -> None:
    needs_torchao()
    folder = tiny.write_backbone(tmp_path / "float", 300)
    found = BackboneRef.find(str(folder))
    ref = found if kind == "hf" else BackboneRef("embedded", "float", "float32", found.sha256)
    quantize_backbone(BackboneConfig(found, Path(), tmp_path, "int8"))
    for path in (tmp_path / "backbone").glob("int_weights.*"):
        shutil.copy(path, folder)
    assert type(load_backbone(ref, tmp_path).model.layers[0].mlp.up_proj) is torch.nn.Linear
    listed = BackboneRef.find(str(tmp_path / "backbone"))
    assert MARK in listed.sha256
    assert type(load_backbone(listed).model.layers[0].mlp.up_proj) is not torch.nn.Linear


# Another model


def test_facts_are_the_same_for_a_gguf_and_for_the_folder_made_of_it(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf")
    save_backbone(load_backbone(BackboneRef.find(str(file))), tmp_path / "dense")
    expected = {"architecture": "llama", "blocks": BLOCKS, "hidden size": WIDTH, "vocabulary": VOCAB}
    assert backbone_facts(file) == backbone_facts(tmp_path / "dense") == expected
    assert backbone_facts(tmp_path / "none") == {}
    inner = {"model_type": "gemma3_text", "num_hidden_layers": 3}
    (tmp_path / "dense/config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": inner}))
    assert backbone_facts(tmp_path / "dense") == {"architecture": "gemma3", "blocks": 3}
    (tmp_path / "dense/config.json").write_text("[1]")
    with pytest.raises(BackboneError, match="cannot be read"):
        backbone_facts(tmp_path / "dense")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 9}, f"blocks {BLOCKS}, the checkpoint's backbone .* has 9"),
        ({"hidden_size": 64}, f"hidden size {WIDTH}, .* has 64"),
        ({"vocab_size": 300}, f"vocabulary {VOCAB}, .* has 300"),
        ({"model_type": "qwen2"}, "architecture llama, .* has qwen2"),
        ({"model_type": "mistral"}, None),
        ({}, None),
    ],
)
def test_a_replacement_must_be_of_the_same_model(tmp_path: Path, change: dict[str, Any], message: str | None) -> None:
    other = write_gguf(tmp_path / "other.gguf")
    told = {"model_type": "llama", "num_hidden_layers": BLOCKS, "hidden_size": WIDTH, "vocab_size": VOCAB} | change
    (tmp_path / "config.json").write_text(json.dumps(told))
    own = BackboneRef("embedded", ".", sha256={"config.json": ""})
    if message is None:
        check_replacement(own, tmp_path, other)
        return
    with pytest.raises(QuantizeBackboneError, match=message) as caught:
        check_replacement(own, tmp_path, other)
    assert str(other) in str(caught.value) and "one model only" in caught.value.hint


def test_a_hub_name_says_nothing_of_its_model(tmp_path: Path) -> None:
    check_replacement(BackboneRef("hf", "owner/model"), tmp_path, write_gguf(tmp_path / "other.gguf"))


def test_the_command_compares_before_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is hashed, loaded or written for a file of another model."""
    checkpoint = tiny.write_checkpoint(tmp_path)
    other = write_gguf(tmp_path / "other.gguf")
    monkeypatch.setattr(backbone_room, "hash_file", lambda path: pytest.fail(f"{path} was read"))
    run = QuantizeRun(checkpoint, tmp_path / "out", "nf4", backbone=BackboneWish("int8", other))
    with pytest.raises(QuantizeBackboneError, match="blocks 2, .* has 3"):
        quantize_run(run)
    assert not list(tmp_path.glob("out*"))


# Options and types


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(
    ("option", "value"),
    [("tensor_types", (("a", "q8_0"),)), ("embedding_type", "q8_0"), ("output_type", "q8_0"), ("importance", TEXT)],
)
def test_options_of_gguf_are_refused_for_int_types(kind: str, option: str, value: Any) -> None:
    names = {"tensor_types": "--override", "embedding_type": "--embedding-type", "output_type": "--output-type",
             "importance": "--importance"}  # fmt: skip
    with pytest.raises(QuantizeBackboneError, match=f"{names[option]} is for GGUF types") as caught:
        BackboneWish(kind, **{option: value})
    assert "GGUF type" in caught.value.hint
    with pytest.raises(QuantizeBackboneError, match=names[option]):
        BackboneConfig(BackboneRef("hf", "a/b"), Path(), Path(), kind, **{option: value})


def test_an_unknown_type_is_refused_with_all_types_named() -> None:
    needs_llama_cpp()
    with pytest.raises(QuantizeBackboneError, match="--backbone 'int9' is not known") as caught:
        BackboneWish("int9")
    assert {"int8", "int4", "q4_k_m", "bf16"} <= set(caught.value.hint.removeprefix("use one of: ").split(", "))
    assert BackboneWish("Q4_K_M").kind == "Q4_K_M"


# Sources that are quantized already


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_gguf_needs_a_word_for_int_types_too(tmp_path: Path, kind: str) -> None:
    needs_torchao()
    source = BackboneRef.find(str(write_gguf(tmp_path / "q8.gguf", kind=Types.Q8_0)))
    with pytest.raises(QuantizeBackboneError, match=r"16 tensors Q8_0.*errors would add") as caught:
        quantize_backbone(BackboneConfig(source, Path(), tmp_path, kind))
    assert "--requantize" in caught.value.hint and not (tmp_path / "backbone").exists()
    report, _ = quantize_backbone(BackboneConfig(source, Path(), tmp_path / "asked", kind, requantize=True))
    assert report["requantized"] == {"Q8_0": 16}
    save_backbone(load_backbone(source), tmp_path / "dense")  # its files are float, whatever they were made from
    dense = BackboneRef.find(str(tmp_path / "dense"))
    assert quantize_backbone(BackboneConfig(dense, Path(), tmp_path, kind))[0]["requantized"] == {}


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_float_gguf_needs_no_word(tmp_path: Path, kind: str) -> None:
    source = BackboneRef.find(str(write_gguf(tmp_path / "float.gguf")))
    assert check_backbone(BackboneConfig(source, Path(), tmp_path, kind)) == {}


@pytest.mark.parametrize("before", ["int8", "int4"])
@pytest.mark.parametrize("requantize", [False, True])
def test_int_layers_are_never_quantized_again(tmp_path: Path, before: str, requantize: bool) -> None:
    """Without a quantized head such a model has a float linear layer left, which must not make it pass."""
    needs_torchao()
    source = BackboneRef.find(str(tiny.write_backbone(tmp_path / "float", 300)))
    _, made = quantize_backbone(BackboneConfig(source, Path(), tmp_path, before))
    config = BackboneConfig(made, tmp_path, tmp_path / "again", "int8", head=True, requantize=requantize)
    with pytest.raises(QuantizeBackboneError, match="int8 or int4 already"):
        quantize_backbone(config)


def test_a_folder_whose_config_says_quantized_needs_a_word(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    source = BackboneRef.find(str(tmp_path))
    with pytest.raises(QuantizeBackboneError, match=r"quantized already \(gptq\)"):
        check_backbone(BackboneConfig(source, Path(), tmp_path, "int8"))
    assert check_backbone(BackboneConfig(source, Path(), tmp_path, "int8", requantize=True)) == {"gptq": 1}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(QuantizeBackboneError, match="cannot be read"):
        check_backbone(BackboneConfig(source, Path(), tmp_path, "int8"))


def test_a_hub_names_size_is_that_of_the_loaded_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_torchao()
    model = load_backbone(BackboneRef.find(str(tiny.write_backbone(tmp_path / "float", 300))))
    held = sum(t.nbytes for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values())
    monkeypatch.setattr(backbone_room, "load_backbone", lambda *_: model)
    report, _ = quantize_backbone(BackboneConfig(BackboneRef("hf", "owner/tiny"), Path(), tmp_path, "int8"))
    assert report["bytes_before"] == held > report["bytes"]


# The importance matrix that a run makes


def test_a_matrix_that_exists_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "a.imatrix.gguf"
    check_importance_target(path, force=False)
    write_importance(path, MATRIX, [])
    with pytest.raises(ImportanceError, match="exists") as caught:
        check_importance_target(path, force=False)
    assert f"--importance {path}" in caught.value.hint and "--force" in caught.value.hint
    check_importance_target(path, force=True)
    path.write_bytes(write_gguf(tmp_path / "model.gguf").read_bytes())
    with pytest.raises(ImportanceError, match="--force does not replace it"):
        check_importance_target(path, force=True)


def test_nothing_is_left_of_a_matrix_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
        with pytest.raises(OSError, match="no space"):
            write_importance(tmp_path / "a.gguf", MATRIX, [])
    assert not list(tmp_path.iterdir())
    write_importance(tmp_path / "a.gguf", MATRIX, [])
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(
    ("more", "message"),
    [({}, "imatrix.gguf exists"), ({"tensor_types": (("attn_z", "q8_0"),)}, "matches no tensor")],
)
def test_the_text_is_not_read_for_a_run_that_cannot_end(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    """The text does not exist: whoever opened it would say so."""
    needs_llama_cpp()
    checkpoint = tiny.write_checkpoint(
        tmp_path / "model", layers=(1,), backbone=write_gguf(tmp_path / "float.gguf", vocab=300)
    )
    write_importance(tmp_path / "out.imatrix.gguf", MATRIX, [])
    wish = BackboneWish("q4_0", importance=TEXT, **more)
    with pytest.raises((ImportanceError, QuantizeBackboneError), match=message):
        quantize_run(QuantizeRun(checkpoint, tmp_path / "out", "nf4", backbone=wish))


def test_the_report_names_the_matrix(tmp_path: Path) -> None:
    needs_llama_cpp()
    checkpoint = tiny.write_checkpoint(
        tmp_path / "model", layers=(1,), backbone=write_gguf(tmp_path / "float.gguf", vocab=300)
    )
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": tiny.TEXT + str(n)}) + "\n" for n in range(4)))
    out = tmp_path / "new" / "out"
    wish = BackboneWish("q4_0", importance=CorpusConfig((str(tmp_path / "text.jsonl"),)), importance_tokens=200)
    told = quantize_run(QuantizeRun(checkpoint, out, "nf4", backbone=wish))["backbone"]
    assert told["importance"] == str(tmp_path / "new/out.imatrix.gguf") and told["importance_tensors"] > 7
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "out.imatrix.gguf"]
    again = BackboneWish("q4_0", importance=Path(told["importance"]))
    quantize_run(QuantizeRun(checkpoint, tmp_path / "again", "nf4", backbone=again))
    files = [folder / "backbone/model.gguf" for folder in (out, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
