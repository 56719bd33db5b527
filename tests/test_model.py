"""The laws of the attached model: untrained is harmless, and cached decoding equals the full forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engram.builders.engram import GateConfig, Table
from engram.builders.layout import Layout
from engram.builders.model import EngramModel, ModelError, Timeline, gate_weights, load_gate_weights

VOCAB = 96
TOLERANCE = 1e-5  # float32: other chunk lengths take other matrix-product kernels, which round differently


def tiny_config(kind: str) -> Any:
    from transformers import AutoConfig

    common: dict[str, Any] = dict(vocab_size=VOCAB, num_hidden_layers=4, hidden_size=32)
    attention: dict[str, Any] = dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    if kind == "gpt2":
        return AutoConfig.for_model("gpt2", vocab_size=VOCAB, n_layer=4, n_embd=32, n_head=4)
    if kind == "gpt_neox":
        return AutoConfig.for_model("gpt_neox", intermediate_size=48, num_attention_heads=4, **common)
    if kind == "gemma3_text":
        return AutoConfig.for_model(kind, head_dim=8, sliding_window=6, **common, **attention)
    if kind == "mixtral":
        return AutoConfig.for_model(kind, num_local_experts=4, num_experts_per_tok=2, **common, **attention)
    return AutoConfig.for_model(kind, **common, **attention)


def attached(kind: str = "llama", *, dialect: str = "demo", layers: tuple[int, ...] = (0, 2, 4)) -> EngramModel:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    layout = Layout.build(
        dialect=dialect, orders=(2, 3), heads=2, head_dim=8, layers=layers, rows_per_head=60, pad_id=2,
        vocab_size=VOCAB, reset_id=7 if dialect == "qwen-ple" else None,
    )  # fmt: skip
    gates = {layer: GateConfig.of_dialect(dialect, 32, layout.memory_width, 1, 3) for layer in layers}
    model = EngramModel(backbone, layout, gates).eval()
    for layer in layers:  # a memory that matters: random everywhere, the convolution too
        for parameter in model.gate(layer).parameters():
            parameter.data.normal_(0, 0.3)
    return model


def lookup(model: EngramModel) -> Callable[[dict[int, np.ndarray]], dict[int, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    layout = model.layout
    tables = {n: torch.randn(layout.table_rows[n], layout.head_dim, generator=generator) for n in layout.layers}
    return lambda rows: {n: Table(tables[n])(torch.from_numpy(rows[n])) for n in layout.layers}


def run(model: EngramModel, ids: Tensor, cuts: list[int], mask: Tensor | None = None, line: Timeline | None = None):
    """Logits of `ids` fed in chunks that end at `cuts`."""
    memory_of = lookup(model)
    line = model.timeline(len(ids)) if line is None else line
    out = []
    with torch.no_grad():
        for begin, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
            part = None if mask is None else mask[:, begin:end]
            rows = line.rows(ids[:, begin:end].numpy(), None if part is None else part.numpy().astype(bool))
            out.append(model(ids[:, begin:end], memory_of(rows), mask_BT=part, timeline=line))
    return torch.cat(out, dim=1)


def full(model: EngramModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, lookup(model)(model.timeline(len(ids)).rows(ids.numpy())))
    return logits


def some_ids(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(5))


DECODERS = ["llama", "gpt2", "gpt_neox", "qwen3", "gemma3_text", "mixtral"]


@pytest.mark.parametrize("kind", DECODERS)
def test_untrained_is_harmless_bit_for_bit(kind: str) -> None:
    model, ids = attached(kind), some_ids()
    with torch.no_grad():
        alone = model.backbone(ids).logits
    assert (full(model, ids) - alone).abs().max() > 1e-2, "the random memory must change the logits"
    for layer in model.layout.layers:
        model.gate(layer).silence()
    assert torch.equal(full(model, ids), alone)


@pytest.mark.parametrize("kind", DECODERS)
def test_cached_decoding_equals_the_full_pass(kind: str) -> None:
    model, ids = attached(kind), some_ids()
    expected = full(model, ids)
    for cuts in ([7], [1, 2, 3], list(range(1, 24)), [5, 14, 15]):
        assert (run(model, ids, cuts) - expected).abs().max() < TOLERANCE, cuts


@pytest.mark.parametrize("dialect", ["demo", "v41", "qwen-ple"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_left_padding_and_unequal_lengths(kind: str, dialect: str) -> None:
    model, ids = attached(kind, dialect=dialect), some_ids(3, 20)
    lengths = [20, 13, 1]
    padded, mask = torch.full((3, 20), 9), torch.zeros(3, 20, dtype=torch.long)
    for i, n in enumerate(lengths):
        padded[i, 20 - n :], mask[i, 20 - n :] = ids[i, :n], 1
    for cuts in ([], [4, 11], [19]):
        logits = run(model, padded, list(cuts), mask)
        for i, n in enumerate(lengths):
            alone = full(model, ids[i : i + 1, :n])[0]
            assert (logits[i, 20 - n :] - alone).abs().max() < TOLERANCE, (i, cuts)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
def test_rollback_of_rejected_tokens(kind: str) -> None:
    model, ids = attached(kind), some_ids()
    expected = full(model, ids)
    line = model.timeline(2)
    run(model, ids[:, :10], [], line=line)
    for rejected in (1, 4, 9):  # the convolution reaches 9 back: rolled over more than once
        run(model, torch.full((2, rejected), 11), [], line=line)
        line.crop(10)
    assert (run(model, ids[:, 10:], [3], line=line) - expected[:, 10:]).abs().max() < TOLERANCE
    line.crop(0)
    assert (run(model, ids, [2], line=line) - expected).abs().max() < TOLERANCE


def test_prefix_reuse_leaves_the_branches_independent() -> None:
    model, ids = attached(), some_ids(1)
    other = torch.cat([ids[:, :12], ids[:, :12].flip(1)], dim=1)
    line = model.timeline()
    run(model, ids[:, :12], [], line=line)
    branch = line.fork()
    assert (run(model, other[:, 12:], [3], line=branch) - full(model, other)[:, 12:]).abs().max() < TOLERANCE
    assert (run(model, ids[:, 12:], [1], line=line) - full(model, ids)[:, 12:]).abs().max() < TOLERANCE


def test_last_only_is_the_last_row() -> None:
    model, ids = attached(), some_ids()
    memory = lookup(model)(model.timeline(2).rows(ids.numpy()))
    with torch.no_grad():
        assert torch.allclose(model(ids, memory, last_only=True), full(model, ids)[:, -1:], atol=TOLERANCE)


def test_gate_weights_survive_a_round_trip() -> None:
    model, other, ids = attached(), attached(), some_ids()
    for layer in model.layout.layers:
        model.gate(layer).value_proj.weight.data.mul_(2)
    load_gate_weights(other, gate_weights(model))
    assert torch.equal(full(model, ids), full(other, ids))
    broken = gate_weights(model)
    del broken[2]["norm_key"]
    with pytest.raises(ModelError, match="layer 2"):
        load_gate_weights(other, broken)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="layer 5 is beyond"):
        attached(layers=(5,))
    model = attached()
    line = model.timeline()
    with pytest.raises(ModelError, match="roll back to position 3"):
        line.crop(3)
    gates = {n: model.gate(n).config for n in model.layout.layers}
    wrong = Layout.build(
        dialect="demo", orders=(2,), heads=2, head_dim=8, layers=(0,), rows_per_head=60, pad_id=2, vocab_size=VOCAB
    )
    with pytest.raises(ModelError, match="layer 0 maps 32"):
        EngramModel(model.backbone, wrong, gates)
    large = Layout.build(
        dialect="demo",
        orders=(2, 3),
        heads=2,
        head_dim=8,
        layers=(0,),
        rows_per_head=60,
        pad_id=2,
        vocab_size=VOCAB + 1,
    )
    with pytest.raises(ModelError, match=f"{VOCAB + 1} ids"):
        EngramModel(model.backbone, large, gates)
