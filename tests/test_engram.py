"""Gate and table against published module outputs, the numpy reference, and dense autograd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engram.builders.engram import Gate, GateConfig, GateError, Table
from engram.builders.layout import Layout
from engram.kernels import reference

GOLDEN = Path(__file__).parent / "golden"


def demo() -> tuple[dict[str, Any], Gate, torch.Tensor, torch.Tensor]:
    golden = json.loads((GOLDEN / "module_demo_tiny.json").read_text())
    config, weights = golden["config"], {k: torch.tensor(v).double() for k, v in golden["weights"].items()}
    gate = Gate(
        GateConfig(
            hidden=8, memory=16, branches=2, bias=True, eps=config["eps_gate_norms"], conv_kernel=4,
            conv_dilation=config["dilation"], conv_eps=config["eps_conv_norm"],
        )
    ).double()  # fmt: skip
    gate.load_state_dict(
        {
            "key_proj.weight": weights["key_w"].flatten(0, 1), "key_proj.bias": weights["key_b"].flatten(),
            "value_proj.weight": weights["value_w"], "value_proj.bias": weights["value_b"],
            "norm_key": weights["norm_key"], "norm_query": weights["norm_query"], "norm_conv": weights["norm_conv"],
            "conv_weight": weights["conv_w"].reshape(16, 4),
        }
    )  # fmt: skip
    layout = Layout.build(
        dialect="demo", orders=(2, 3), heads=2, head_dim=4, layers=(1,), rows_per_head=config["engram_vocab_size"],
        pad_id=config["compressed_pad_id"], vocab_size=30, token_map=np.arange(30),
    )  # fmt: skip
    rows = layout.rows(np.array(golden["compressed_ids"]), local=True)[1]
    np.testing.assert_array_equal(rows, golden["hash_ids"])
    memory = torch.nn.functional.embedding(torch.from_numpy(rows + layout.offsets(1)), weights["table"]).flatten(-2)
    return golden, gate, torch.tensor(golden["hidden"]).double(), memory


def test_demo_module_equals_the_published_output() -> None:
    golden, gate, hidden, memory = demo()
    assert hidden.dim() == 4
    np.testing.assert_allclose(gate.open(hidden, memory).detach(), golden["gates"], atol=1e-6)
    added, _ = gate(hidden, memory)
    np.testing.assert_allclose(added.detach(), golden["delta"], atol=1e-6)


def test_any_chunking_of_the_convolution_gives_the_whole() -> None:
    golden, gate, hidden, memory = demo()
    inputs = torch.zeros(2, 0, 16).double()
    pieces = []
    for begin, end in ((0, 1), (1, 2), (2, 7), (7, hidden.shape[1])):
        past = inputs[:, -gate.past :] if begin else None
        added, new = gate(hidden[:, begin:end], memory[:, begin:end], past)
        inputs = torch.cat([inputs, new], dim=1)
        pieces.append(added)
    np.testing.assert_allclose(torch.cat(pieces, 1).detach(), golden["delta"], atol=1e-6)


def bf16(text: str, shape: tuple[int, ...]) -> torch.Tensor:
    raw = np.frombuffer(bytes.fromhex(text), dtype="<u2").astype(np.uint32) << 16
    return torch.from_numpy(raw.view(np.float32).reshape(shape).copy()).double()


def test_v41_gate_equals_the_published_output() -> None:
    golden = json.loads((GOLDEN / "module_v41_tiny.json").read_text())["gate"]
    length, branches, width = golden["T"], golden["hc_mult"], golden["dim"]
    gate = Gate(GateConfig(width, (branches + 1) * width, branches, kind="copysign", eps=golden["eps"])).double()
    joined = torch.eye((branches + 1) * width).double()  # memory = the published kv, so the projections only select
    gate.load_state_dict(
        {
            "key_proj.weight": joined[: branches * width], "value_proj.weight": joined[branches * width :],
            "norm_query": bf16(golden["q_weight_bf16"], (branches, width)),
            "norm_key": bf16(golden["k_weight_bf16"], (branches, width)),
        }
    )  # fmt: skip
    hidden = bf16(golden["x_bf16"], (1, length, branches, width))
    memory = bf16(golden["kv_bf16"], (1, length, (branches + 1) * width))
    np.testing.assert_allclose(gate.open(hidden, memory)[0].detach(), golden["gate"], atol=1e-6)
    added, _ = gate(hidden, memory)
    np.testing.assert_allclose((hidden + added)[0].detach(), golden["out"], atol=2e-6)
    mask = torch.tensor([golden["token_mask"]])
    added, _ = gate(hidden, memory, None, mask)
    np.testing.assert_allclose((hidden + added)[0].detach(), golden["out_masked"], atol=2e-6)


def test_qwen_fusion_equals_transformers_own_layer() -> None:
    modeling = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

    config = Qwen4ExpTextConfig(
        vocab_size=512, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts_per_tok=2, num_experts=4,
        ple_layer_ids=[2], ple_embed_dim=32, ngram_size=3, heads_per_ngram=2, ngram_vocab_size_base=100,
        make_ngram_vocab_size_divisible_by=8, hc_count=2, hc_lowrank=8, eos_token_id=511, indexer_n_heads=2,
        indexer_kv_heads=1, indexer_head_dim=32, indexer_budget=16, indexer_compress_ratio=4,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = modeling.Qwen4ExpTextPLELayer(config, 1, 0).double()
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.5)
    layout = Layout.build(
        dialect="qwen-ple", orders=(2, 3), heads=2, head_dim=8, layers=(1,), rows_per_head=100, seed=config.seed,
        pad_id=511, vocab_size=512, reset_id=511,
    )  # fmt: skip
    gate = Gate(
        GateConfig(16, 32, 2, eps=config.rms_norm_eps, conv_kernel=4, conv_dilation=3, conv_eps=config.rms_norm_eps)
    ).double()
    gate.load_state_dict(
        {
            "key_proj.weight": theirs.key_proj.weight, "value_proj.weight": theirs.value_proj.weight,
            # theirs multiply by 1 + weight
            **{n: 1 + getattr(theirs, n).weight.view(2, 16) for n in ("norm_key", "norm_query", "norm_conv")},
            "conv_weight": theirs.conv1d.weight.flatten(1),
        }
    )  # fmt: skip
    ids = torch.randint(0, 500, (2, 13))
    ids[0, 5] = 511
    hidden = torch.randn(2, 13, 2, 16).double()
    expected = theirs(hidden.flatten(-2), ids, None)
    rows = layout.rows(ids.numpy())[1]
    memory = torch.nn.functional.embedding(torch.from_numpy(rows), theirs.ple_embedding.ngram_embedding.weight)
    added, _ = gate(hidden, memory.flatten(-2))
    # their norms compute in float32 whatever the input is
    np.testing.assert_allclose(added.flatten(-2).detach(), expected.detach(), atol=2e-6)


@pytest.mark.parametrize("kind", ["plain", "sqrt", "copysign"])
def test_gate_equals_the_reference(kind: str) -> None:
    torch.manual_seed(1)
    gate = Gate(GateConfig(6, 10, 2, kind=kind, conv_kernel=3, conv_dilation=2)).double()
    for parameter in gate.parameters():
        parameter.data.normal_()
    hidden, memory = torch.randn(2, 9, 2, 6).double(), torch.randn(2, 9, 10).double()
    hidden[0, 3] = 0  # a score of exactly zero
    x, e = hidden.numpy(), memory.numpy()
    w = {name: value.detach().numpy() for name, value in gate.state_dict().items()}
    key = (e @ w["key_proj.weight"].T).reshape(2, 9, 2, 6)
    opened = reference.gate(x, key, w["norm_query"], w["norm_key"], eps=gate.config.eps, kind=kind)
    np.testing.assert_allclose(gate.open(hidden, memory).detach(), opened, atol=1e-12)
    u = opened[..., None] * (e @ w["value_proj.weight"].T)[:, :, None]
    inputs = reference.rms_norm(u, w["norm_conv"], gate.config.conv_eps).reshape(2, 9, 12)
    conv = reference.short_conv(inputs, np.zeros((2, gate.past, 12)), w["conv_weight"], 2)
    added, _ = gate(hidden, memory)
    np.testing.assert_allclose(added.detach(), u + conv.reshape(u.shape), atol=1e-10)


def test_table_gradients_are_those_of_a_dense_embedding() -> None:
    torch.manual_seed(2)
    weight = torch.randn(50, 3)
    table = Table(weight.clone()).train()
    dense = weight.clone().requires_grad_()
    for _ in range(2):  # two passes, as gradient accumulation does
        rows = torch.randint(0, 50, (2, 7, 4))
        scale = torch.randn(2, 7, 12)
        (table(rows) * scale).sum().backward()
        (torch.nn.functional.embedding(rows, dense).flatten(-2) * scale).sum().backward()
    touched = table.take_touched()
    assert touched is not None and dense.grad is not None
    rows_U, gradient_UD = touched
    expected = torch.zeros(50, 3)
    expected[rows_U] = gradient_UD
    torch.testing.assert_close(expected, dense.grad)
    assert len(set(rows_U.tolist())) == rows_U.numel() < 50
    assert table.take_touched() is None
    assert torch.equal(table.weight, weight), "the forward must not change the table"


@pytest.mark.parametrize(
    ("field", "value"), [("kind", "soft"), ("hidden", 0), ("branches", 0), ("conv_kernel", -1), ("conv_dilation", 0)]
)
def test_a_wrong_gate_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(GateError, match=f"{field} "):
        GateConfig(**({"hidden": 4, "memory": 4} | {field: value}))
    with pytest.raises(GateError, match="wrong fields"):
        GateConfig.from_json({"hidden": 4, "memory": 4, "color": 1})
