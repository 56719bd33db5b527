"""Backbones of int8 and int4 layers: values against numpy, files against arithmetic, reloading bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from engram import EngramError
from engram.builders.backbone import BackboneError, BackboneRef, load_backbone
from engram.builders.backbone_int import (
    FEW_ROWS,
    MARK,
    WEIGHTS,
    Int8Linear,
    IntWeightsError,
    put_weight,
    stored_form,
    torchao_form,
)
from engram.quantize.backbone import BackboneConfig, QuantizeBackboneError, quantize_backbone

pytest.importorskip("torchao", reason="the extra `torchao` is not installed")
DTYPES = ["float32", "bfloat16"]
IDS = torch.arange(40).reshape(2, 20) * 7 % 300


@pytest.fixture
def source(tmp_path: Path) -> BackboneRef:
    return BackboneRef.find(str(tiny.write_backbone(tmp_path / "float", 300)))


def quantized(source: BackboneRef, out: Path, kind: str, **more: Any) -> tuple[dict[str, Any], BackboneRef]:
    return quantize_backbone(BackboneConfig(source, Path(), out, kind, **more))


def as_numpy(stored: dict[str, torch.Tensor]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(weight, step of each value), decoded from the file form by numpy alone."""
    parts = {name: t.float().numpy() if t.dtype == torch.bfloat16 else t.numpy() for name, t in stored.items()}
    if "int8" in parts:
        step = np.broadcast_to(parts["scale"][:, None], parts["int8"].shape)
        return parts["int8"].astype(np.float32) * step, step
    low, high = parts["int4"] & 15, parts["int4"] >> 4
    values = np.stack([low, high], axis=-1).reshape(len(low), -1).astype(np.float32)
    group = values.shape[1] // parts["scale"].shape[1]
    step, zero = (np.repeat(parts[name], group, axis=1) for name in ("scale", "zero"))
    return (values - 8) * step + zero, step


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize(("kind", "group"), [("int8", 0), ("int4", 32), ("int4", 64), ("int4", 128)])
def test_stored_values_are_within_half_a_step(kind: str, group: int) -> None:
    weight = torch.from_numpy(np.random.default_rng(3).standard_t(4, size=(48, 256)).astype(np.float32))
    weight[5] = 0.25
    weight[6] = 0
    back, step = as_numpy(stored_form(weight, kind, group))
    error = np.abs(back - weight.numpy())
    rounding = 2.0**-8 * np.abs(weight.numpy()).max(axis=1, keepdims=True) if kind == "int4" else 0
    assert (error <= 0.5001 * step + rounding).all()
    assert not back[6].any()
    assert error.mean() > 0.1 * step.mean(), "a check that cannot fail: the step is far too coarse"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "group"), [("int8", 0), ("int4", 32), ("int4", 128)])
def test_torchao_multiplies_by_the_stored_weight(kind: str, group: int, dtype: str) -> None:
    weight = torch.from_numpy(np.random.default_rng(4).normal(size=(48, 256)).astype(np.float32))
    stored = stored_form(weight, kind, group)
    form = torchao_form(stored, group, getattr(torch, dtype))
    found = torch.nn.functional.linear(torch.eye(256, dtype=getattr(torch, dtype)), form).T.float().numpy()
    close = 1e-6 if dtype == "float32" else 2.0**-7
    np.testing.assert_allclose(found, as_numpy(stored)[0], rtol=close, atol=close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_reloaded_model_gives_the_same_bits(source: BackboneRef, tmp_path: Path, kind: str, dtype: str) -> None:
    report, made = quantized(source, tmp_path, kind)
    before = load_backbone(source, dtype="float32")
    stored = {name: stored_form(before.get_submodule(name).weight, kind, 32) for name in report["modules"]}
    model = load_backbone(source, dtype=dtype)
    for name, parts in stored.items():
        put_weight(model, name, torchao_form(parts, 32, getattr(torch, dtype)))
    again = load_backbone(made, tmp_path, dtype=dtype)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(load_backbone(source, dtype=dtype)))
    assert again.generation_config.eos_token_id == 0


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_logits_are_those_of_the_decoded_weights(source: BackboneRef, tmp_path: Path, kind: str) -> None:
    """The float model with numpy's reading of the file in place is the oracle."""
    report, made = quantized(source, tmp_path, kind)
    tensors = load_file(tmp_path / "backbone" / WEIGHTS)
    plain = load_backbone(source)
    for name in report["modules"]:
        parts = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.startswith(f"{name}.weight.")}
        plain.get_submodule(name).weight.data = torch.from_numpy(np.ascontiguousarray(as_numpy(parts)[0]))
    torch.testing.assert_close(logits(load_backbone(made, tmp_path)), logits(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_files_hold_what_the_arithmetic_says(source: BackboneRef, tmp_path: Path, kind: str) -> None:
    report, made = quantized(source, tmp_path, kind)
    float_model = load_backbone(source)
    linear = {n: m for n, m in float_model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert report["modules"].keys() == linear.keys()
    assert {name.removesuffix(".weight") for name in report["left"]}.isdisjoint(linear)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= report["left"].keys()
    tensors = load_file(tmp_path / "backbone" / WEIGHTS)
    held = sum(t.nbytes for name, t in tensors.items() if name.partition(".weight.")[0] in linear)
    values = sum(m.in_features * m.out_features for m in linear.values())
    scales = sum(m.out_features for m in linear.values()) * 4 if kind == "int8" else values // 32 * 4
    assert held == (values if kind == "int8" else values // 2) + scales
    files = list((tmp_path / "backbone").iterdir())
    assert report["bytes"] == sum(path.stat().st_size for path in files)
    assert made.sha256.keys() == {path.name for path in files}
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    assert report["bytes_before"] == (tmp_path / "float" / "model.safetensors").stat().st_size
    assert report["resident"] < report["resident_before"]
    assert report["resident_before"] == sum(p.nbytes for p in float_model.parameters()) + sum(
        b.nbytes for b in {b.data_ptr(): b for b in float_model.buffers()}.values()
    )


def test_four_bits_take_four_bits_of_memory_on_a_cpu_in_bfloat16() -> None:
    weight = torch.randn(64, 128)
    form: Any = torchao_form(stored_form(weight, "int4", 32), 32, torch.bfloat16)
    assert form.qdata.nbytes == weight.numel() // 2


def test_layers_that_no_group_fits_become_int8(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=50, hidden_size=64, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    report, made = quantized(BackboneRef.find(str(tmp_path / "float")), tmp_path, "int4", group=128)
    assert report["modules"]["model.layers.0.mlp.down_proj"] == "int8"
    assert report["modules"]["model.layers.0.mlp.up_proj"] == "int4 g64"
    assert torch.isfinite(load_backbone(made, tmp_path)(IDS % 50).logits).all()


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_quantized_where_asked(tmp_path: Path, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    source = BackboneRef.find(str(tmp_path / "float"))
    _, made = quantized(source, tmp_path / "kept", "int8")
    kept = load_backbone(made, tmp_path / "kept")
    assert (kept.lm_head.weight is kept.model.embed_tokens.weight) == tied
    report, made = quantized(source, tmp_path / "all", "int8", head=True)
    assert report["modules"]["lm_head"] == "int8"
    model = load_backbone(made, tmp_path / "all")
    assert type(model.lm_head) is Int8Linear
    assert torch.equal(model.model.embed_tokens.weight, load_backbone(source).model.embed_tokens.weight)


def test_few_and_many_rows_agree_and_gradients_pass() -> None:
    torch.manual_seed(5)
    layer = torch.nn.Module()
    layer.inner = torch.nn.Linear(256, 64, bias=True)
    stored = stored_form(layer.inner.weight, "int8", 0)
    layer.to(torch.bfloat16)
    put_weight(layer, "inner", torchao_form(stored, 0, torch.bfloat16))
    x = torch.randn(1, FEW_ROWS + 1, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        many, few = layer.inner(x), layer.inner(x[:, :FEW_ROWS])
    truth = x.double() @ torch.from_numpy(as_numpy(stored)[0]).double().T + layer.inner.bias.double()
    torch.testing.assert_close(few.double(), truth[:, :FEW_ROWS], rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(many.double(), truth, rtol=2**-6, atol=2**-6)
    x.requires_grad_(True)
    layer.inner(x[:, :1]).sum().backward()
    assert x.grad is not None and x.grad[0, 0].any()


def test_the_engine_runs_a_package_with_a_quantized_backbone(tmp_path: Path) -> None:
    from engram.quantize.package import ExportConfig, export_package
    from engram.quantize.verify import verify_package
    from engram.runtime.engine import Model

    checkpoint = tiny.write_checkpoint(tmp_path)
    manifest = json.loads((checkpoint / "engram.json").read_text())
    _, made = quantize_backbone(
        BackboneConfig(BackboneRef.from_json(manifest["backbone"]), checkpoint, checkpoint, "int8")
    )
    (checkpoint / "engram.json").write_text(json.dumps(manifest | {"backbone": made.to_json()}))
    export_package(ExportConfig(checkpoint, tmp_path / "package"))
    assert verify_package(tmp_path / "package")["ok"]
    model = Model.open(tmp_path / "package")
    try:
        ids = model.encode(tiny.TEXT)[:30]
        whole, pieces = model.session(), model.session()
        expected = whole.feed(ids)
        for token in ids[:-1]:
            pieces.feed([token])
        torch.testing.assert_close(pieces.feed(ids[-1:]), expected, rtol=1e-4, atol=1e-5)
        assert any(type(m) is Int8Linear for m in model.engram.backbone.modules())
    finally:
        model.close()


# Errors


def damaged(source: BackboneRef, tmp_path: Path, change: Any) -> str:
    _, made = quantized(source, tmp_path, "int4")
    folder = tmp_path / "backbone"
    tensors, mark = load_file(folder / WEIGHTS), json.loads((folder / MARK).read_text())
    change(tensors, mark)
    save_file(tensors, folder / WEIGHTS)
    (folder / MARK).write_text(json.dumps(mark))
    with pytest.raises(EngramError) as caught:
        load_backbone(made, tmp_path)
    assert type(caught.value) in (IntWeightsError, BackboneError)
    return str(caught.value)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop(f"{Q}.weight.zero"), f"lacks '{Q}.weight.zero'"),
        (lambda t, m: t.pop("model.norm.weight"), "lacks the weight 'model.norm.weight'"),
        (lambda t, m: t.update(extra=torch.ones(2)), "holds 'extra' [2], which is no parameter"),
        (lambda t, m: t.update({"model.norm.weight": torch.ones(3)}), "holds 'model.norm.weight' [3]"),
        (lambda t, m: t.update({f"{Q}.weight.int4": torch.zeros(8, 2, dtype=torch.uint8)}), "needed is torch.uint8"),
        (lambda t, m: t.update({f"{Q}.weight.scale": torch.ones(32, 1)}), "scale is torch.float32"),
        (lambda t, m: m["modules"].update({"model.norm": m["modules"].pop(Q)}), "lacks 'model.norm.weight.int4'"),
        (lambda t, m: m["modules"][Q].update(type="int3"), "has type 'int3'"),
        (lambda t, m: m["modules"][Q].update(group=7), "groups of 7"),
        (lambda t, m: m["modules"].update({Q: 5}), "cannot be read"),
        (lambda t, m: m.update(version=9), "version 9"),
        (lambda t, m: m.pop("modules"), "cannot be read"),
    ],
)
def test_damage_is_named(source: BackboneRef, tmp_path: Path, change: Any, message: str) -> None:
    assert message in damaged(source, tmp_path, change)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_frequencies_keep_their_precision(source: BackboneRef, dtype: str) -> None:
    """A bfloat16 copy of them is off by a radian within a thousand positions."""
    buffers = dict(load_backbone(source, dtype=dtype).named_buffers())
    exact = 1.0 / 10000.0 ** (np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(buffers["model.rotary_emb.inv_freq"].double().numpy(), exact, rtol=1e-6)


def test_a_module_that_is_no_linear_layer_is_refused(source: BackboneRef, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], mark: Any) -> None:
        mark["modules"]["model.norm"] = {"type": "int8"}
        tensors["model.norm.weight.int8"] = torch.zeros(32, 32, dtype=torch.int8)
        tensors["model.norm.weight.scale"] = torch.ones(32)

    assert "makes no linear layer of it" in damaged(source, tmp_path, change)


def test_a_truncated_weight_file_is_refused(source: BackboneRef, tmp_path: Path) -> None:
    _, made = quantized(source, tmp_path, "int8")
    path = tmp_path / "backbone" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(made, tmp_path)


def test_transformers_alone_does_not_start_it_at_random(source: BackboneRef, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    quantized(source, tmp_path, "int8")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "backbone", use_safetensors=True)


def test_a_quantized_backbone_is_not_quantized_again(source: BackboneRef, tmp_path: Path) -> None:
    _, made = quantized(source, tmp_path, "int8", head=True)
    with pytest.raises(QuantizeBackboneError, match="no float linear layer") as caught:
        quantize_backbone(BackboneConfig(made, tmp_path, tmp_path / "again", "int4"))
    assert "take the float backbone" in caught.value.hint


def test_an_unknown_group_is_refused(source: BackboneRef, tmp_path: Path) -> None:
    with pytest.raises(QuantizeBackboneError, match="group 48"):
        quantized(source, tmp_path, "int4", group=48)


def test_an_altered_source_is_refused(source: BackboneRef, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "float" / "config.json", tmp_path / "float" / "generation_config.json")
    with pytest.raises(BackboneError, match="SHA-256"):
        quantized(source, tmp_path, "int8")


def test_missing_torchao_is_named(source: BackboneRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, made = quantized(source, tmp_path, "int8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(IntWeightsError, match="needs torchao") as caught:
        load_backbone(made, tmp_path)
    assert "engram-lm[torchao]" in caught.value.hint
