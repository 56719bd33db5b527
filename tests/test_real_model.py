"""The laws of the attached model on SmolLM2-135M itself, with real text; a toy could hide what depth amplifies."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engram.builders.backbone import BackboneRef, load_backbone
from engram.builders.engram import GateConfig, Table
from engram.builders.layout import Layout
from engram.builders.model import EngramModel, Timeline
from engram.builders.tokenizer import load_tokenizer
from engram.builders.vocab import compress_vocabulary

pytestmark = pytest.mark.real
LAYERS = (1, 15, 30)  # the paper's two places and the output of the last norm
LENGTH = 40


@pytest.fixture(scope="module")
def model(smollm2_folder: Path) -> EngramModel:
    tokenizer = load_tokenizer(smollm2_folder)
    token_map = compress_vocabulary(tokenizer).token_map
    layout = Layout.build(
        dialect="demo", orders=(2, 3), heads=4, head_dim=16, layers=LAYERS, rows_per_head=5000, pad_id=2,
        vocab_size=len(token_map), token_map=token_map,
    )  # fmt: skip
    gate = GateConfig.of_dialect("demo", 576, layout.memory_width, 1, 3)
    made = EngramModel(load_backbone(BackboneRef.find(str(smollm2_folder))), layout, {n: gate for n in LAYERS})
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ids(smollm2_folder: Path) -> Tensor:
    text = pydoc_data.topics.topics["with"] + pydoc_data.topics.topics["class"]
    encoded = load_tokenizer(smollm2_folder).encode(text).ids
    return torch.tensor([encoded[:LENGTH], encoded[100 : 100 + LENGTH]])


def tables(model: EngramModel) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(1)
    layout = model.layout
    return {n: torch.randn(layout.table_rows[n], layout.head_dim, generator=generator) for n in LAYERS}


def feed(model: EngramModel, ids: Tensor, cuts: list[int], mask: Tensor | None, line: Timeline | None) -> Tensor:
    kept, out = tables(model), []
    moved = model.timeline(len(ids)) if line is None else line
    for begin, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        part = None if mask is None else mask[:, begin:end]
        rows = moved.rows(ids[:, begin:end].numpy(), None if part is None else part.numpy().astype(bool))
        memory = {n: Table(kept[n])(torch.from_numpy(rows[n])) for n in LAYERS}
        with torch.inference_mode():
            out.append(model(ids[:, begin:end], memory, mask_BT=part, timeline=moved))
    return torch.cat(out, dim=1)


def whole(model: EngramModel, ids: Tensor) -> Tensor:
    rows = model.layout.rows(ids.numpy())
    memory = {n: Table(tables(model)[n])(torch.from_numpy(rows[n])) for n in LAYERS}
    with torch.inference_mode():
        out: Tensor = model(ids, memory)
    return out


def worst(got: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest logit (about 30: float32 itself resolves 2e-6 there)."""
    return float((got - expected).abs().max() / expected.abs().max())


def test_untrained_is_harmless_bit_for_bit(model: EngramModel, ids: Tensor) -> None:
    for layer in LAYERS:
        model.gate(layer).silence()
    with torch.inference_mode():
        alone = model.backbone(ids).logits
    assert torch.equal(whole(model, ids), alone)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_cached_decoding_equals_the_full_pass(
    model: EngramModel, ids: Tensor, dtype: torch.dtype, tolerance: float
) -> None:
    model.to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.inference_mode():
        alone = model.backbone(ids).logits
    for layer in LAYERS:
        for parameter in model.gate(layer).parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    expected = whole(model, ids)
    assert worst(alone, expected) > 0.01, "the random memory must change the logits"
    assert worst(feed(model, ids, [17, 18, 19, 30], None, None), expected) < tolerance
    lengths = [LENGTH, 23]
    padded, mask = torch.full((2, LENGTH), 11), torch.zeros(2, LENGTH, dtype=torch.long)
    for i, n in enumerate(lengths):
        padded[i, LENGTH - n :], mask[i, LENGTH - n :] = ids[i, :n], 1
    logits = feed(model, padded, [20, 21], mask, None)
    assert worst(logits[0], expected[0]) < tolerance
    assert worst(logits[1, LENGTH - 23 :], expected[1, :23]) < tolerance
    line = model.timeline(2)
    feed(model, ids[:, :20], [], None, line)
    feed(model, torch.full((2, 12), 5), [3], None, line)
    line.crop(20)
    assert worst(feed(model, ids[:, 20:], [4], None, line), expected[:, 20:]) < tolerance


def test_tokenizer_splits_digits_like_llama_cpp(smollm2_folder: Path) -> None:
    pieces = load_tokenizer(smollm2_folder).encode("in 2026, 135M").tokens
    assert [p for p in pieces if any(c.isdigit() for c in p)] == ["2", "0", "2", "6", "1", "3", "5"]
    assert np.all([len(p) for p in pieces])
