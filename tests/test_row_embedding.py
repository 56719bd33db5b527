"""transformers' own Qwen3.8-Flash-Next with its table mapped from our package: the same logits, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import write_gemma, write_qwen4_exp

from engram.quantize.convert import ConvertConfig, convert
from engram.quantize.package import open_package
from engram.quantize.row_store import RowStoreError
from engram.runtime.row_embedding import RowEmbedding

END = 511


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids with ends of sequence among them, also two in a row."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, 512, (batch, length))
    ids[:, length // 3] = END
    ids[0, length // 2 : length // 2 + 2] = END
    return torch.from_numpy(ids)


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in place"])
def test_qwen4_exp_gives_the_same_logits(tmp_path: Path, in_place: bool) -> None:
    """Prefill in one go and in parts, padding on the left, and decoding token by token with the cache."""
    model: Any = write_qwen4_exp(tmp_path / "m")
    convert(ConvertConfig(tmp_path / "m", tmp_path / "package", in_place=in_place))
    ids = tokens(3, 24)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0

    def runs() -> list[torch.Tensor]:
        with torch.no_grad():
            whole = model(ids).logits
            padded = model(ids, attention_mask=mask).logits
            found = model(ids[:, :7], use_cache=True)
            parts, cache = [found.logits], found.past_key_values
            for i in range(7, 24):
                found = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
                parts.append(found.logits)
            generated = model.generate(ids[:1], max_new_tokens=12, do_sample=False, eos_token_id=None)
        return [whole, padded, torch.cat(parts, dim=1), generated]

    expected = runs()
    owner = model.model.layers[1].ple.ple_embedding
    with open_package(tmp_path / "package") as package:
        owner.ngram_embedding.weight.data.fill_(float("nan"))
        owner.ngram_embedding = RowEmbedding(package.layers[1])
        assert "4,064 rows of 16" in repr(owner.ngram_embedding)
        for ours, theirs in zip(runs(), expected, strict=True):
            assert torch.equal(ours, theirs)
        rows = package.layout.rows(ids.numpy())[1]
        asked: list[np.ndarray] = []
        owner.ngram_embedding.register_forward_hook(lambda _, given, __: asked.append(given[0].numpy()))
        with torch.no_grad():
            model(ids)
        assert np.array_equal(asked[0].reshape(rows.shape), rows)


@pytest.mark.parametrize("kind", ["gemma3n", "gemma4"])
def test_a_row_for_every_layer_is_what_gemma_looks_up(tmp_path: Path, kind: str) -> None:
    """The rows of an id, side by side, are its line of the per-layer table."""
    weight = write_gemma(tmp_path / "m", kind).model.embed_tokens_per_layer.weight.detach()
    convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    ids = np.random.default_rng(0).integers(0, 400, (2, 50))
    with open_package(tmp_path / "package") as package:
        rows = torch.from_numpy(package.layout.rows(ids)[0])
        assert torch.equal(RowEmbedding(package.layers[0])(rows).flatten(-2), weight[torch.from_numpy(ids)])


def test_bf16_and_nothing_and_outside(tmp_path: Path) -> None:
    write_qwen4_exp(tmp_path / "m")
    convert(ConvertConfig(tmp_path / "m", tmp_path / "package"))
    with open_package(tmp_path / "package") as package:
        single, half = RowEmbedding(package.layers[1]), RowEmbedding(package.layers[1], torch.bfloat16)
        ids = torch.tensor([[0, 4063], [7, 7]])
        assert torch.equal(half(ids), single(ids).bfloat16())
        assert single(torch.empty((0, 3), dtype=torch.int64)).shape == (0, 3, 16)
        with pytest.raises(RowStoreError):
            single(torch.tensor([4064]))
