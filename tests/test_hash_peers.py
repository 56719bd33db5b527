"""A million tokens of every dialect against somebody else's hash: transformers, llama.cpp, or its published formula.

Formulas are written anew here, over the whole at once in unsigned integers and by another route than the product takes;
a sample of positions is hashed in Python's own integers, which do not overflow, walking back token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import layout_of
from numpy.typing import NDArray
from published import write_qwen4_exp

from engram.builders.layout import Layout
from engram.kernels import dispatch

Ints = NDArray[np.int64]
PATHS = dispatch.available()
SHAPE, CALLS = (8, 32768), 4  # tokens of a call: 4 * 8 * 32,768 = 1,048,576 in all
SAMPLE = 2000
LLAMA_TOKENS = 1 << 20


def random_ids(vocab: int, special: int | None, shape: tuple[int, ...], seed: int) -> Ints:
    """Ids of all the vocabulary, many at its ends, and many of one id, also several in a row."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, shape)
    ids = np.where(rng.random(shape) < 0.1, rng.choice([0, 1, vocab - 2, vocab - 1], shape), ids)
    return ids if special is None else np.where(rng.random(shape) < 0.15, special, ids)


def calls(vocab: int, special: int | None) -> Iterator[Ints]:
    for seed in range(CALLS):
        yield random_ids(vocab, special, SHAPE, seed)


def same_rows(layout: Layout, ids_BT: Ints, expected: dict[int, Ints]) -> None:
    """Every path gives these rows; in C++ also in chunks, with what the next one must know carried over."""
    assert set(expected) == set(layout.layers)
    for path in PATHS:
        with dispatch.force(path):
            for layer, rows in layout.rows(ids_BT).items():
                np.testing.assert_array_equal(rows, expected[layer], err_msg=f"{path}, layer {layer}")
    history, begin = None, 0
    for end in (1, 2, 4, 700, ids_BT.shape[1]):
        part = ids_BT[:, begin:end]
        for layer, rows in layout.rows(part, history).items():
            np.testing.assert_array_equal(rows, expected[layer][:, begin:end], err_msg=f"chunk from {begin}")
        history, begin = layout.history(part, history), end


def same_sample(ids_BT: Ints, expected_BTC: Ints, of: Callable[[list[int]], list[int]], walk: int) -> None:
    """`of` gets the ids from a position back to at most `walk` before it, the newest first, and gives its rows."""
    rng = np.random.default_rng(9)
    places = [(0, t) for t in range(5)]
    places += zip(rng.integers(0, ids_BT.shape[0], SAMPLE), rng.integers(0, ids_BT.shape[1], SAMPLE), strict=True)
    for b, t in places:
        assert of(ids_BT[b, max(0, t - walk) : t + 1][::-1].tolist()) == expected_BTC[b, t].tolist(), (b, t)


def shifted(ids_BT: Ints, k: int, fill: int) -> Ints:
    out = np.full_like(ids_BT, fill)
    out[:, k:] = ids_BT[:, : ids_BT.shape[1] - k]
    return out


def xor_rows(columns: Sequence[Ints], layout: Layout, layer: int) -> Ints:
    """Rows of tokens [B, T] at distances 0, 1, …: products of unsigned numbers, a modulo for each head."""
    out, first, mixed = [], 0, np.zeros(columns[0].shape, dtype=np.uint64)
    for k, tokens in enumerate(columns):
        mixed ^= tokens.astype(np.uint64) * np.uint64(layout.multipliers[layer][k])
        if k + 1 in layout.orders:
            for prime in layout.primes[layer][layout.orders.index(k + 1)]:
                out.append((mixed % np.uint64(prime)).astype(np.int64) + first)
                first += prime
    return np.stack(out, axis=-1)


def xor_by_hand(layout: Layout, layer: int, tokens: Sequence[int]) -> list[int]:
    out: list[int] = []
    first = 0
    for order, primes in zip(layout.orders, layout.primes[layer], strict=True):
        mixed = 0
        for token, multiplier in zip(tokens[:order], layout.multipliers[layer], strict=False):
            mixed ^= token * multiplier
        for prime in primes:
            out.append(mixed % prime + first)
            first += prime
    return out


def token_map(vocab: int, size: int) -> Ints:
    """Every compressed id at least once."""
    rng = np.random.default_rng(1)
    return np.concatenate([rng.permutation(size), rng.integers(0, size, vocab - size)])


def test_demo_is_its_formula() -> None:
    """The paper's: padding before the text, nothing ends it."""
    layout = Layout.build(
        dialect="demo", orders=(2, 3), heads=8, head_dim=64, layers=(1, 15), rows_per_head=646400, pad_id=2,
        vocab_size=129280, token_map=token_map(129280, 99092),
    )  # fmt: skip
    assert layout.token_map is not None
    pad = int(layout.token_map[2])
    for ids in calls(129280, 2):
        mapped = layout.token_map[ids]
        columns = [shifted(mapped, k, pad) for k in range(3)]
        expected = {layer: xor_rows(columns, layout, layer) for layer in layout.layers}
        same_rows(layout, ids, expected)

        def by_hand(back: list[int]) -> list[int]:
            return xor_by_hand(layout, 15, [int(layout.token_map[i]) for i in back] + [pad] * 2)

        same_sample(ids, expected[15], by_hand, 2)


def test_v41_is_its_formula() -> None:
    """A token of an image is padding, and so is all that lies behind it; negative ids are dead too."""
    image, pad_id = 129264, 2
    layout = Layout.build(
        dialect="v41", orders=(2, 3, 4), heads=8, head_dim=256, layers=(1, 14), rows_per_head=16_000_000, pad_id=pad_id,
        vocab_size=129280, token_map=token_map(129280, 99092), dead_ids=(image,),
    )  # fmt: skip
    assert layout.token_map is not None
    pad = int(layout.token_map[pad_id])
    for ids in calls(129280, image):
        ids[ids == 7] = -1
        dead = (ids == image) | (ids < 0)
        t = np.arange(ids.shape[1])
        last_dead = np.maximum.accumulate(np.where(dead, t, -1), axis=1)
        mapped = layout.token_map[np.maximum(ids, 0)]
        columns = [np.where(t - k > last_dead, shifted(mapped, k, pad), pad) for k in range(4)]
        expected = {layer: xor_rows(columns, layout, layer) for layer in layout.layers}
        same_rows(layout, ids, expected)

        def by_hand(back: list[int]) -> list[int]:
            tokens = []
            for i in back:
                if i == image or i < 0:
                    break
                tokens.append(int(layout.token_map[i]))
            return xor_by_hand(layout, 1, tokens + [pad] * 4)

        same_sample(ids, expected[1], by_hand, 3)


def test_longcat_is_its_formula() -> None:
    """Powers of the vocabulary's size by Horner's rule; the end token belongs to the text that it ends."""
    vocab, end, orders, heads = 131072, 2, (2, 3, 4), 4
    moduli = [78 * vocab + 2 * i + 1 for i in range(12)]
    offsets = np.cumsum([0, *moduli[:-1]])
    layout = Layout.build(
        dialect="longcat", orders=orders, heads=heads, head_dim=256, layers=(0,), moduli=moduli, pad_id=0,
        reset_id=end, vocab_size=vocab,
    )  # fmt: skip
    for ids in calls(vocab, end):
        text = np.cumsum(shifted((ids == end).astype(np.int64), 1, 0), axis=1)  # which text a token is of
        columns = [np.where(shifted(text, k, -1) == text, shifted(ids, k, 0), 0).astype(np.uint64) for k in range(4)]
        out = []
        for column, modulus in enumerate(moduli):
            total = np.zeros(ids.shape, dtype=np.uint64)
            for k in reversed(range(orders[column // heads])):
                total = (total * np.uint64(vocab) + columns[k]) % np.uint64(modulus)
            out.append(total.astype(np.int64) + offsets[column])
        expected = {0: np.stack(out, axis=-1)}
        same_rows(layout, ids, expected)

        def by_hand(back: list[int]) -> list[int]:
            tokens = back[:1]
            for i in back[1:]:
                if i == end:
                    break
                tokens.append(i)
            return [
                sum(i * vocab**k for k, i in enumerate(tokens[: 2 + column // 4])) % modulus + int(offsets[column])
                for column, modulus in enumerate(moduli)
            ]

        same_sample(ids, expected[0], by_hand, 3)


def test_a_row_of_the_identity_is_the_token() -> None:
    layout = layout_of("identity", layers=(0,), vocab_size=262144, rows_per_head=262400)
    for ids in calls(262144, None):
        same_rows(layout, ids, {0: ids[..., None]})


@pytest.fixture
def modeling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' own Qwen module, whose embedding gives the rows it is asked for and holds no table."""
    module = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    torch = pytest.importorskip("torch")

    class Rows(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self, rows: int, width: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, 1))

        def forward(self, rows: Any) -> Any:
            return rows.unsqueeze(-1)

    monkeypatch.setattr(module.nn, "Embedding", Rows)
    return module


def test_qwen_is_that_of_transformers(modeling: Any) -> None:
    """The published sizes, two layers, batches; every row of a batch begins a text."""
    import torch
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

    end, vocab = 248044, 248320
    config = Qwen4ExpTextConfig(
        vocab_size=vocab, eos_token_id=end, ngram_size=3, heads_per_ngram=8, ngram_vocab_size_base=20_000_000,
        make_ngram_vocab_size_divisible_by=128, seed=1234,
    )  # fmt: skip
    theirs = {place: modeling.Qwen4ExpTextNGramEmbedding(config, 2560, place, place) for place in (0, 1)}
    layout = Layout.build(
        dialect="qwen-ple", orders=(2, 3), heads=8, head_dim=160, layers=(0, 1), rows_per_head=20_000_000, seed=1234,
        pad_id=end, reset_id=end, vocab_size=vocab,
    )  # fmt: skip
    for ids in calls(vocab, end):
        with torch.no_grad():
            same_rows(layout, ids, {n: m(torch.from_numpy(ids), None).numpy() for n, m in theirs.items()})


def test_padding_is_hashed_as_in_transformers(tmp_path: Path) -> None:
    """Through the whole model with its attention mask: what the first tokens of a padded text see."""
    import torch

    model = write_qwen4_exp(tmp_path)
    ple = model.model.layers[1].ple.ple_embedding
    layout = Layout.build(
        dialect="qwen-ple", orders=(2, 3), heads=2, head_dim=16, layers=(1,), rows_per_head=1000, seed=1234, pad_id=511,
        reset_id=511, vocab_size=512, multiple=8,
    )  # fmt: skip
    asked: list[Any] = []
    ple.ngram_embedding.register_forward_pre_hook(lambda module, given: asked.append(given[0]))
    ids, first = random_ids(512, 511, (6, 40), 3), np.arange(6) * 3
    mask = np.arange(40) >= first[:, None]
    with torch.no_grad():
        model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64)))
    start = np.arange(40) <= first[:, None]
    for path in PATHS:
        with dispatch.force(path):
            np.testing.assert_array_equal(layout.rows(ids, start_BT=start)[1][mask], asked[0].numpy()[mask])


def test_qwen_is_that_of_llama_cpp(tmp_path: Path) -> None:
    """The published vocabulary and multipliers over a smaller table; texts in one piece and in several."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make gguf)")
    from llama_rows import has_qwen4exp, rows_of, write_model

    if not has_qwen4exp():
        pytest.skip("this llama.cpp has no qwen4exp")
    end, vocab = 248044, 248320
    layout = Layout.build(
        dialect="qwen-ple", orders=(2, 3), heads=8, head_dim=16, layers=(0,), rows_per_head=20_000, seed=1234,
        pad_id=end, reset_id=end, vocab_size=vocab,
    )  # fmt: skip
    write_model(tmp_path / "m.gguf", layout)
    pieces = [512] * 3 + [1, 1, 2, 508]
    ids = random_ids(vocab, end, (LLAMA_TOKENS // sum(pieces), sum(pieces)), 5)
    with rows_of(tmp_path / "m.gguf", layout) as read:
        for text in ids:
            read.forget()
            rows = np.concatenate([read(part) for part in np.split(text, np.cumsum(pieces)[:-1])])
            for path in (dispatch.name(), "reference"):
                with dispatch.force(path):
                    np.testing.assert_array_equal(layout.rows(text[None])[0][0], rows, err_msg=path)
